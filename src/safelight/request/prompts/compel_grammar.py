"""The grammar of compel's prompts, and what a prompt in it means: phrases of weighted fragments.

The grammar is that of compel 2.5.1 (https://github.com/damian0815/compel; licence: ``compel_grammar.LICENSE``), element
by element, because no document describes how it treats brackets, quotes and signs. The tests compare both parsers.
There are two differences: text behind ``.and()``, which compel ignores, is an error; and ``()`` is the empty prompt.
compel itself is not imported: it needs torch, and a text encoder that transformers no longer has.
"""

from __future__ import annotations

import re
import string
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyparsing as pp

PLUS, MINUS = 1.1, 0.9
"""A fragment's weight for each ``+`` and each ``-`` behind it."""

_SYMBOLS = '(),".+-='
_COMMA_BEFORE_TEXT = re.compile(r",(\S)")


class CompelSyntaxError(Exception):
    """The text is not a prompt in compel's syntax. ``at``: the character's position, None if it is not known."""

    def __init__(self, reason: str, at: int | None = None) -> None:
        super().__init__(reason)
        self.at = at


class UnsupportedOperatorError(Exception):
    """The prompt uses an operator of compel's that Safelight does not support. ``operator``: its name."""

    def __init__(self, operator: str) -> None:
        super().__init__(operator)
        self.operator = operator


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a text with one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Phrase:
    """Fragments that a text encoder reads together."""

    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Blend:
    """``.blend()``: the weighted sum of what a text encoder makes of each phrase.

    ``normalized``: the weights are divided by their sum.
    """

    phrases: tuple[Phrase, ...]
    weights: tuple[float, ...]
    normalized: bool


@dataclass(frozen=True, slots=True)
class Conjunction:
    """``.and()``: what a text encoder makes of each part, concatenated. A plain prompt has one part."""

    parts: tuple[Phrase | Blend, ...]
    weights: tuple[float, ...]


EMPTY = Phrase((Fragment(""),))

_parsing = threading.Lock()


def parse(text: str) -> Conjunction:
    """Parse a prompt.

    Raises CompelSyntaxError, and UnsupportedOperatorError for ``.swap()`` and ``withLora()``.
    """
    text = _COMMA_BEFORE_TEXT.sub(r", \1", text)
    if not text.strip():
        return Conjunction((EMPTY,), (1.0,))
    try:
        # The elements of pyparsing learn at their first use how many arguments their actions take.
        with _parsing:
            (root,) = _grammar().parse_string(text)
        return _conjunction(root)
    except pp.ParseException as error:
        raise CompelSyntaxError(error.msg, error.loc) from error
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise CompelSyntaxError(str(error)) from error


# Nodes of the parsed tree. A node's children are nodes, fragments, and groups of both.


@dataclass(frozen=True, slots=True)
class _Attention:
    weight: float
    children: list[Any]


@dataclass(frozen=True, slots=True)
class _Unsupported:
    operator: str


@dataclass(frozen=True, slots=True)
class _Blend:
    prompts: list[Any]
    weights: list[float]
    normalized: bool


@dataclass(frozen=True, slots=True)
class _Conjunction:
    """``rest``: the text behind an explicit conjunction."""

    prompts: list[Any]
    weights: list[float] = field(default_factory=list[float])
    rest: str = ""


def _conjunction(root: _Conjunction) -> Conjunction:
    if root.rest.strip():
        raise CompelSyntaxError(f"nothing may follow .and(), but {root.rest.strip()[:30]!r} does")
    given = root.weights or [1.0] * len(root.prompts)
    if len(given) != len(root.prompts):
        raise CompelSyntaxError(f".and() has {len(root.prompts)} prompts, but {len(given)} weights")
    parts: list[Phrase | Blend] = []
    weights: list[float] = []
    for prompt, weight in zip(root.prompts, given, strict=True):
        part = _blend(prompt) if isinstance(prompt, _Blend) else _phrase(prompt)
        if part is not None:
            parts.append(part)
            weights.append(weight)
    return Conjunction(tuple(parts), tuple(weights)) if parts else Conjunction((EMPTY,), (1.0,))


def _blend(node: _Blend) -> Blend:
    weights = node.weights or [1.0] * len(node.prompts)
    if len(node.prompts) != len(weights):
        raise CompelSyntaxError(f".blend() has {len(node.prompts)} prompts, but {len(weights)} weights")
    phrases = [phrase for prompt in node.prompts if (phrase := _phrase(prompt)) is not None]
    if len(phrases) != len(weights):
        raise CompelSyntaxError("a prompt of .blend() has no words")
    return Blend(tuple(phrases), tuple(weights), node.normalized)


def _phrase(prompt: Iterable[Any]) -> Phrase | None:
    """Return the fragments of a prompt; neighbours with the same weight are one. None if there are none."""
    fused: list[Fragment] = []
    for fragment in _flattened(prompt, 1.0):
        if fused and fused[-1].weight == fragment.weight:
            fused[-1] = _fragment(f"{fused[-1].text} {fragment.text}", fragment.weight)
        else:
            fused.append(fragment)
    return Phrase(tuple(fused)) if fused else None


def _flattened(node: Any, scale: float) -> list[Fragment]:
    """Return the fragments of a node. Weights of nested nodes multiply."""
    if isinstance(node, Fragment):
        return [_fragment(node.text, node.weight * scale)]
    if isinstance(node, _Unsupported):
        raise UnsupportedOperatorError(node.operator)
    if isinstance(node, _Attention):
        return [fragment for child in node.children for fragment in _flattened(child, scale * node.weight)]
    return [fragment for child in node for fragment in _flattened(child, scale)]


def _fragment(text: str, weight: float = 1.0) -> Fragment:
    return Fragment(text.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"'), weight)


# Parse actions: they make a node of what an element has matched.


def _attention(target: Any, operator: Any) -> _Attention:
    if isinstance(operator, str):
        operator = (PLUS if operator[0] == "+" else MINUS) ** len(operator)
    return _Attention(operator, list(target))


def _explicit_attention(found: pp.ParseResults) -> _Attention:
    return _attention(found[0], found[2][0])


def _implicit_attention(found: pp.ParseResults) -> _Attention:
    return _attention(found[0], found[1][0])


def _swap(_: pp.ParseResults) -> _Unsupported:
    return _Unsupported("swap()")


def _lora(found: pp.ParseResults) -> _Unsupported:
    return _Unsupported(str(found[0]))


def _options(given: Any) -> list[float]:
    return [float(option[0]) for option in given]


def _blended(found: pp.ParseResults) -> _Blend:
    options = list(found[2])
    normalized = not (options and options[-1][0] == "no_normalize")
    return _Blend(list(found[0]), _options(options if normalized else options[:-1]), normalized)


def _explicit(found: pp.ParseResults) -> _Conjunction:
    return _Conjunction(list(found[0]), _options(found[2]), "".join(found[3:]))


def _implicit(found: pp.ParseResults) -> _Conjunction:
    return _Conjunction(list(found))


def _plain(found: pp.ParseResults) -> list[Fragment]:
    return [_fragment(text) for text in found]


def _quoted(inside: pp.ParserElement):
    """The action of a quoted text: ``inside`` parses what the quotes enclose."""

    def action(found: pp.ParseResults) -> Any:
        text = str(found[0])
        if not text.strip():
            return Fragment("")
        return (inside + pp.StringEnd()).parse_string(text.replace('"', '\\"'))

    return action


@cache
def _grammar() -> pp.ParserElement:
    """Build the grammar: the names of its elements are compel's."""
    lparen, rparen, comma, equals = (pp.Suppress(symbol) for symbol in "(),=")
    digits = pp.Combine(pp.Optional("-") + pp.Word(pp.nums))
    number = pp.common.real | digits.copy().set_parse_action(pp.token_map(float))
    keyword = pp.Word(pp.alphanums + "_-")

    escaped = pp.Or([pp.Literal(f"\\{symbol}") for symbol in _SYMBOLS])
    sign_in_word = pp.one_of("- +") + pp.NotAny(pp.White() | pp.Char(_SYMBOLS) | pp.StringEnd())
    plain_character = pp.CharsNotIn(string.whitespace + _SYMBOLS, exact=1)
    non_syntax_word = pp.Combine(pp.OneOrMore(escaped | sign_in_word | digits | plain_character))
    non_syntax_word.set_parse_action(_plain)
    free_word = pp.CharsNotIn(string.whitespace).set_parse_action(_plain)

    attention, swap, parenthesized, quoted, lora = (pp.Forward() for _ in range(5))
    parts = [lora, attention, swap, parenthesized, quoted, non_syntax_word]
    punctuation = (pp.Literal(",") | pp.Literal(".")).set_parse_action(_plain)
    fragment = pp.ZeroOrMore(pp.MatchFirst([*parts, punctuation]))
    fragment_excluding_commas = pp.ZeroOrMore(pp.MatchFirst(parts))
    quoted <<= pp.QuotedString(quote_char='"', esc_char=None, esc_quote='\\"').set_parse_action(_quoted(fragment))
    parenthesized <<= lparen + fragment + rparen

    option = pp.Group(
        keyword + equals + (number | keyword) | number.copy().set_parse_action(pp.token_map(str)) | keyword
    )
    options = pp.Optional(pp.DelimitedList(option))
    target = quoted | parenthesized | non_syntax_word
    signs = pp.Word("+") | pp.Word("-")
    weight = pp.Group(signs | number)
    explicit_attention = pp.Group(target) + pp.Literal(".attend") + lparen + weight + rparen
    implicit_attention = (pp.Group(quoted | parenthesized) + pp.NotAny(pp.White()) + weight) | (
        pp.Group(non_syntax_word) + pp.NotAny(pp.White()) + pp.Group(signs)
    )
    attention <<= explicit_attention.set_parse_action(_explicit_attention) | implicit_attention.set_parse_action(
        _implicit_attention
    )
    replacement = pp.Group(fragment_excluding_commas) + pp.Optional(comma + options)
    swap <<= (pp.Group(target) + pp.Literal(".swap") + lparen + replacement + rparen).set_parse_action(_swap)
    trigger = pp.Literal("useLora") | pp.Literal("withLora")
    lora <<= (trigger + lparen + keyword + pp.Optional(comma + number) + rparen).set_parse_action(_lora)

    prompt = pp.ZeroOrMore(
        pp.MatchFirst([swap, lora, attention, quoted, parenthesized, free_word, pp.White().suppress()])
    )
    quoted_prompt = pp.QuotedString(quote_char='"', esc_char=None, esc_quote='\\"').set_parse_action(_quoted(prompt))
    prompts = lparen + pp.Group(pp.DelimitedList(pp.Group(target | quoted_prompt), min=1)) + rparen
    arguments = lparen + pp.Group(options) + rparen
    blend = (prompts + pp.Literal(".blend") + arguments).set_parse_action(_blended)
    explicit = prompts + pp.one_of(".and .add") + arguments + pp.Optional(pp.Regex(r"[\s\S]+"))
    loras = pp.Optional(pp.Group(pp.OneOrMore(lora)))
    implicit = loras + (blend | pp.Group(prompt)) + loras + pp.StringEnd()
    return explicit.set_parse_action(_explicit) | implicit.set_parse_action(_implicit)
