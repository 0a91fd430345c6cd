"""The grammar of choices in prompts: ``{red|green}``, ``{0.5::a|2::b}``, ``{1-2$$ and $$a|b|c}``, ``__colour__``.

It is the grammar of dynamicprompts 0.31 (https://github.com/adieyal/dynamicprompts; licence: ``choices.LICENSE``)
without variables, wrappers and comments. The tests compare both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from safelight.request.prompts import tags

NO_MEANING = "\0"
"""Stands in a mask for a character that is plain text, whatever the character is."""

_OPTIONS_IN_TAG = re.compile(r"\{[^{}]*\|[^{}]*\}")
_SIGNS_IN_TAG = re.compile(r"[{}|$]")
_SINGLE_DOLLAR = re.compile(r"(?<!\$)\$(?![\${])")
_TAB_STOPS = 8

# Plain text ends at a sign with a meaning, which depends on where the text stands.
_TEXT = re.compile(r"(?:(?!__)[^{$])+")
_TEXT_IN_OPTION = re.compile(r"(?:(?!__)[^{$|}])+")
_TEXT_IN_NAME = re.compile(r"(?:(?!__)[^{$()])+|\)(?:(?!__)[^{$|}])*")

_SPACE = re.compile(r"[ \t\r\n]*")
_BOUNDS = re.compile(r"(?:(?P<least>[0-9]+)?(?P<to>-)(?P<most>[0-9]+)?|(?P<exactly>[0-9]+))\$\$")
_SEPARATOR = re.compile(rf"([^${{}}{NO_MEANING}]+)\$\$")
_WEIGHT = re.compile(r"([+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)|[0-9]+)::")


class ChoiceSyntaxError(Exception):
    """The text's choices cannot be read. ``at``: the character's position in the text."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


class Method(Enum):
    """How options and values are chosen. The value is the sign in a prompt, as in ``{~a|b}`` and ``__~colour__``."""

    RANDOM = "~"
    COMBINATIONS = "!"
    CYCLE = "@"


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Series:
    """Parts that follow each other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One of the options in braces."""

    value: Node
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """Options in braces.

    ``least``, ``most``: how many of them are chosen.
    ``separator``: stands between the chosen options.
    ``method``: how they are chosen, None for the method of the text around them.
    ``source``: the text in the prompt, for errors.
    """

    options: tuple[Option, ...]
    least: int = 1
    most: int = 1
    separator: str = ","
    method: Method | None = None
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class NamedWildcard:
    """A wildcard.

    ``name``: may contain choices.
    ``method``: how a value is chosen, None for the method of the text around the wildcard.
    """

    name: Node
    method: Method | None = None


Node = PlainText | Series | Options | NamedWildcard


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text without the backslashes that escape braces.

    ``mask``: the text with :data:`NO_MEANING` for each character that would have a meaning, but is plain text here.
    ``origins``: the position of each character before the backslashes were removed.
    """

    plain: str
    mask: str
    origins: tuple[int, ...]


def marked(text: str, expand_tabs: bool = False) -> MarkedText:
    """Mark what is plain text: escaped braces, a single ``$``, and tags except for options in them.

    ``expand_tabs``: replace tabs by spaces, as ``str.expandtabs`` does.
    """
    signs = tags.replaced(text, _masked_tag)
    plain: list[str] = []
    mask: list[str] = []
    origins: list[int] = []
    column, escaped = 0, False
    for at, (character, sign) in enumerate(zip(text, signs, strict=True)):
        if not escaped and sign == "\\" and signs[at + 1 : at + 2] in ("{", "}"):
            escaped = True
            continue
        width = _TAB_STOPS - column % _TAB_STOPS if character == "\t" and expand_tabs else 1
        plain.append(" " * width if character == "\t" and expand_tabs else character)
        mask.append(NO_MEANING if escaped else plain[-1] if character == "\t" else sign)
        origins += [at] * width
        column = 0 if character in "\r\n" else column + width
        escaped = False
    return MarkedText("".join(plain), _SINGLE_DOLLAR.sub(NO_MEANING, "".join(mask)), tuple(origins))


def _masked_tag(tag: str) -> str:
    """Names in a tag stay as they are. Only options, as in ``<lora:ink:{0.5|0.8}>``, stay options."""
    masked = tag.replace("_", NO_MEANING)
    return masked if _OPTIONS_IN_TAG.search(masked) else _SIGNS_IN_TAG.sub(NO_MEANING, masked)


def parse(text: str) -> Node:
    """Parse a text. Raises ChoiceSyntaxError."""
    # dynamicprompts expands tabs, and a recorded prompt must give the same text.
    read = marked(text, expand_tabs=True)
    return _Parser(read).whole()


class _Parser:
    """Reads the mask from left to right. ``_at``: the next character's position."""

    def __init__(self, read: MarkedText) -> None:
        self._plain = read.plain
        self._mask = read.mask
        self._origins = (*read.origins, read.origins[-1] + 1 if read.origins else 0)
        self._at = 0

    def whole(self) -> Node:
        node = self._series(_TEXT)
        if self._at < len(self._mask):
            raise self._error("$$ needs a number of options before it, as in {2$$a|b|c}", self._at)
        return node

    def _error(self, reason: str, at: int) -> ChoiceSyntaxError:
        return ChoiceSyntaxError(reason, self._origins[at])

    def _series(self, text: re.Pattern[str]) -> Node:
        parts: list[Node] = []
        while (part := self._part(text)) is not None:
            parts.append(part)
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _part(self, text: re.Pattern[str]) -> Node | None:
        if self._mask.startswith("${", self._at):
            raise self._error("has a variable, ${…}, which is not supported", self._at)
        if self._mask.startswith("{", self._at):
            return self._options()
        if self._mask.startswith("__", self._at):
            return None if text is _TEXT_IN_NAME else self._wildcard()
        found = self._taken(text)
        return PlainText(self._plain[found.start() : found.end()]) if found else None

    def _taken(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Move behind the pattern if it is next."""
        found = pattern.match(self._mask, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _sign(self, sign: str) -> bool:
        """Move behind the sign if it is next."""
        there = self._mask.startswith(sign, self._at)
        self._at += len(sign) if there else 0
        return there

    def _method(self) -> Method | None:
        return next((method for method in Method if self._sign(method.value)), None)

    def _options(self) -> Options:
        start = self._at
        self._at += 1
        self._taken(_SPACE)
        method = self._method()
        bounds, separator = self._taken(_BOUNDS), None
        if bounds is not None:
            separator = self._taken(_SEPARATOR)
        self._taken(_SPACE)
        options = [self._option()]
        while self._sign("|"):
            options.append(self._option())
        if self._mask.startswith("$", self._at):
            raise self._error("$$ needs a number of options before it, as in {2$$a|b|c}", self._at)
        if not self._sign("}"):
            raise self._error("{ has no end: write } behind its last option, or \\{ for a plain brace", start)
        least, most = _bounds(bounds, len(options))
        between = self._plain[separator.start(1) : separator.end(1)] if separator else ","
        return Options(tuple(options), least, most, between, method, self._plain[start : self._at])

    def _option(self) -> Option:
        self._taken(_SPACE)
        weight = self._taken(_WEIGHT)
        return Option(self._series(_TEXT_IN_OPTION), float(weight[1]) if weight else 1.0)

    def _wildcard(self) -> NamedWildcard:
        start = self._at
        self._at += 2
        method = self._method()
        name = self._series(_TEXT_IN_NAME)
        if self._mask.startswith("(", self._at) and name != Series(()):
            raise self._error("a wildcard has no parameters: write __NAME__ without (…)", self._at)
        if name == Series(()) or not self._sign("__"):
            raise self._error("__ begins a wildcard that has no name or no end: write __NAME__", start)
        return NamedWildcard(name, method)


def _bounds(found: re.Match[str] | None, count: int) -> tuple[int, int]:
    """Return how many options are chosen, at least and at most."""
    if found is None:
        return 1, 1
    if found["exactly"]:
        return int(found["exactly"]), int(found["exactly"])
    if not found["least"] and not found["most"]:
        return 1, count
    bounds = int(found["least"] or 1), int(found["most"] or count)
    return min(bounds), max(bounds)
