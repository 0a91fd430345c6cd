"""Makes the choices in a parsed prompt, at random or all of them.

A seed must give the text that it always gave. The random numbers are therefore drawn in the order of dynamicprompts
0.31 (https://github.com/adieyal/dynamicprompts; licence: ``choices.LICENSE``), and the tests compare both. An iterator
here draws only when a text is taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, cycle, islice, repeat
from random import Random

from safelight.request.prompts import choice_grammar
from safelight.request.prompts.choice_grammar import (
    ChoiceSyntaxError,
    Method,
    NamedWildcard,
    Node,
    Option,
    Options,
    PlainText,
    Series,
)
from safelight.request.prompts.wildcard_files import WildcardFiles, WildcardValue

PLAIN_NAME = re.compile(r"[\w/*.-]*")
"""A name that needs a file. Other text between underscores, such as ``__ a b __``, is a wildcard only if it has one."""

_DRAWN_TOGETHER = 10
"""How many values of a file with weights are drawn at once."""


class UnusableChoiceError(Exception):
    """A choice has no text. ``source``: the choice, as in the prompt."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(reason)
        self.source = source


class Sampling:
    """Makes choices.

    ``files``: the wildcards.
    ``chance``: gives the random numbers.
    """

    def __init__(self, files: WildcardFiles, chance: Random) -> None:
        self._files = files
        self._chance = chance

    def random(self, node: Node) -> str:
        """Return a text with random choices. Raises UnusableChoiceError."""
        return next(self._texts(node, Method.RANDOM))

    def combinations(self, node: Node, most: int) -> list[str]:
        """Return a text for each combination of choices, at most ``most``. Raises UnusableChoiceError."""
        found = list(islice(self._every(node), most))
        if not found:
            raise _without_text(node)
        return found

    def _texts(self, node: Node, around: Method) -> Iterator[str]:
        """The texts of a node: all combinations, or without end. ``around``: the method of the text around the node."""
        match node:
            case PlainText():
                return iter((node.text,)) if around is Method.COMBINATIONS else repeat(node.text)
            case Series():
                return self._combined(node, around) if around is Method.COMBINATIONS else self._joined(node, around)
            case Options():
                return self._chosen(node, _inner(node.method, around))
            case NamedWildcard():
                return self._named(node, _inner(node.method, around))

    def _every(self, node: Node) -> Iterator[str]:
        """All combinations of a node. A node whose own sign asks for one choice has one."""
        endless = isinstance(node, Options | NamedWildcard) and node.method not in (None, Method.COMBINATIONS)
        return self._texts(Series((node,)) if endless else node, Method.COMBINATIONS)

    # Parts that follow each other.

    def _joined(self, series: Series, method: Method) -> Iterator[str]:
        parts = [self._texts(part, method) for part in series.parts]
        while True:
            yield "".join([next(part) for part in parts])

    def _combined(self, series: Series, method: Method) -> Iterator[str]:
        """All combinations. A part with another method of its own gives its next text to each of them."""
        others = [part for part in series.parts if _own_method(part) is not Method.COMBINATIONS]
        endless = [self._texts(part, method) for part in others]
        # dynamicprompts draws the first text of each part before it is needed, and equal parts share one iterator.
        ahead: list[str] = []
        for part, texts in zip(others, endless, strict=True):
            if (text := next(texts, None)) is None:
                raise _without_text(part)
            ahead.append(text)

        def behind(parts: tuple[Node, ...]) -> Iterator[str]:
            if not parts:
                yield ""
                return
            first, rest = parts[0], parts[1:]
            if _own_method(first) in (None, Method.COMBINATIONS):
                for text in self._texts(first, method):
                    for following in behind(rest):
                        yield text + following
                return
            index = others.index(first)
            for following in behind(rest):
                text, ahead[index] = ahead[index], next(endless[index])
                yield text + following

        yield from behind(series.parts)

    # Options in braces.

    def _chosen(self, node: Options, method: Method) -> Iterator[str]:
        if len(node.options) == 1 and isinstance(wildcard := node.options[0].value, NamedWildcard):
            yield from self._chosen(self._values_as_options(node, wildcard, method), method)
            return
        most = min(node.most, len(node.options))
        counts = range(min(node.least, most), most + 1)
        match method:
            case Method.RANDOM:
                yield from self._random_options(node, counts)
            case Method.COMBINATIONS:
                yield from self._combined_options(node, counts)
            case Method.CYCLE:
                yield from self._cycled_options(node, counts)
                raise _without_text(node)  # A cycle ends only if it is empty.

    def _values_as_options(self, node: Options, wildcard: NamedWildcard, method: Method) -> Options:
        """The options of ``{2$$__name__}`` are the values of the wildcard."""
        name = self._name(wildcard, method)
        values = self._files.values(name)
        if not values:
            raise self._missing(name)
        options = tuple(Option(_parsed(text, name)) for text in _by_weight(values))
        if not options:
            raise UnusableChoiceError(f"__{name}__", "has only values with a weight below 1")
        least, most = min(node.least, len(values)), min(node.most, len(values))
        return Options(options, least, most, node.separator, wildcard.method, node.source)

    def _random_options(self, node: Options, counts: range) -> Iterator[str]:
        if len(node.options) == 1:
            yield from self._texts(node.options[0].value, Method.RANDOM)
            return
        while True:
            values = self._without_replacement(node, self._chance.randint(counts.start, counts.stop - 1))
            yield _join([next(self._texts(value, Method.RANDOM)) for value in values], node.separator)

    def _without_replacement(self, node: Options, count: int) -> list[Node]:
        values = [option.value for option in node.options]
        weights = [option.weight for option in node.options]
        chosen: list[Node] = []
        for _ in range(count):
            try:
                chosen.append(self._chance.choices(values, weights=weights, k=1)[0])
            except ValueError as error:
                raise UnusableChoiceError(node.source, "needs more options with a weight above 0") from error
            # As in dynamicprompts, the first of equal weights goes: that of another option, maybe.
            weights.remove(weights[values.index(chosen[-1])])
            values.remove(chosen[-1])
        return chosen

    def _combined_options(self, node: Options, counts: range) -> Iterator[str]:
        seen: set[tuple[str, ...]] = set()
        for count in counts:
            for values in _choices(_values(node), count):
                for texts in self._every_text(values):
                    if len(set(texts)) == count and texts not in seen:
                        seen.add(texts)
                        yield _join(texts, node.separator)

    def _every_text(self, values: tuple[Node, ...]) -> Iterator[tuple[str, ...]]:
        if not values:
            yield ()
            return
        texts = self._texts(values[0], Method.COMBINATIONS)
        if _own_method(values[0]) in (None, Method.COMBINATIONS):
            for text in texts:
                for following in self._every_text(values[1:]):
                    yield text, *following
        else:
            for following in self._every_text(values[1:]):
                yield next(texts), *following

    def _cycled_options(self, node: Options, counts: range) -> Iterator[str]:
        def texts(values: tuple[Node, ...]) -> Iterator[str]:
            parts = [self._texts(value, Method.CYCLE) for value in values]
            while True:
                # dynamicprompts draws the last first.
                yield _join([next(part) for part in reversed(parts)][::-1], node.separator)

        for one in cycle(texts(values) for count in counts for values in _choices(_values(node), count)):
            yield next(one)

    # Wildcards.

    def _named(self, node: NamedWildcard, method: Method) -> Iterator[str]:
        name = self._name(node, method)
        values = self._files.values(name)
        if values:
            yield from self._values(values, name, method)
            if method is not Method.COMBINATIONS:
                raise _without_text(node)  # Random values and a cycle end only if there are none.
            return
        if not PLAIN_NAME.fullmatch(name):
            # dynamicprompts draws the choices in the name once more for the text.
            name = self._name(node, method)
        if PLAIN_NAME.fullmatch(name):
            raise self._missing(name)
        yield from self._texts(PlainText(f"__{name}__"), method)

    def _name(self, node: NamedWildcard, method: Method) -> str:
        if isinstance(node.name, PlainText):
            return node.name.text
        name = next(self._texts(node.name, method), None)
        if name is None:
            raise _without_text(node.name)
        return name

    def _missing(self, name: str) -> UnusableChoiceError:
        file = self._files.folder / f"{name}.txt"
        unread = "".join(f"; cannot be read: {problem}" for problem in self._files.problems[:3])
        return UnusableChoiceError(name, f"is a wildcard without a file: create {file} with one value per line{unread}")

    def _values(self, values: tuple[WildcardValue, ...], name: str, method: Method) -> Iterator[str]:
        match method:
            case Method.RANDOM:
                if any(value.text for value in values):
                    for text in self._drawn(values, name):
                        if text:
                            yield next(self._texts(_parsed(text, name), method))
            case Method.COMBINATIONS:
                for text in filter(None, _by_weight(values)):
                    yield from self._every(_parsed(text, name))
            case Method.CYCLE:
                nodes = [_parsed(text, name) for text in _by_weight(values) if text]
                for texts in cycle([self._texts(node, method) for node in nodes]):
                    yield next(texts)

    def _drawn(self, values: tuple[WildcardValue, ...], name: str) -> Iterator[str]:
        texts = [value.text for value in values]
        weights = [1 if value.weight is None else value.weight for value in values]
        if len(set(weights)) == 1:
            while True:
                yield self._chance.choice(texts)
        try:
            while True:
                yield from self._chance.choices(texts, cum_weights=list(accumulate(weights)), k=_DRAWN_TOGETHER)
        except ValueError as error:
            raise UnusableChoiceError(f"__{name}__", "has no value with a weight above 0") from error


def _own_method(node: Node) -> Method | None:
    return node.method if isinstance(node, Options | NamedWildcard) else None


def _inner(own: Method | None, around: Method) -> Method:
    """The method of a node. Where one text is chosen, no node can give all combinations."""
    return around if own is None or (own is Method.COMBINATIONS and around is not own) else own


def _values(node: Options) -> tuple[Node, ...]:
    return tuple(option.value for option in node.options)


def _choices(values: tuple[Node, ...], count: int) -> Iterator[tuple[Node, ...]]:
    """Each way to choose ``count`` values that differ; none if there are not so many. To search for them takes time."""
    return _permutations(values, count) if count <= len(set(values)) else iter(())


def _permutations(values: tuple[Node, ...], count: int) -> Iterator[tuple[Node, ...]]:
    """Each way to choose ``count`` values that differ."""
    if count == 0:
        yield ()
        return
    for value in values:
        for following in _permutations(tuple(other for other in values if other != value), count - 1):
            yield value, *following


def _join(texts: Iterable[str], separator: str) -> str:
    """Join texts, without the separator before an empty first text and behind an empty last one."""
    texts = list(texts)
    if len(texts) == 1:
        return texts[0]
    return separator.join(texts).removeprefix(separator).removesuffix(separator)


def _by_weight(values: tuple[WildcardValue, ...]) -> Iterator[str]:
    """Each value as often as its weight says."""
    for value in values:
        yield from repeat(value.text, 1 if value.weight is None else int(value.weight))


def _parsed(text: str, name: str) -> Node:
    try:
        return choice_grammar.parse(text)
    except ChoiceSyntaxError as error:
        problem = f"cannot be read as a value of __{name}__: at character {error.at}: {error}"
        raise UnusableChoiceError(text, problem) from error


def _without_text(node: Node) -> UnusableChoiceError:
    reason = "gives no text: it has fewer options that differ than it asks for, or only empty values or weights below 1"
    match node:
        case Options():
            return UnusableChoiceError(node.source, reason)
        case NamedWildcard(name=PlainText(text=name)):
            return UnusableChoiceError(f"__{name}__", reason)
        case _:
            return UnusableChoiceError("", reason)
