"""Weights in prompts, in AUTOMATIC1111's syntax: ``(word)`` multiplies the weight by 1.1, ``[word]`` divides it by 1.1,
``(word:1.3)`` multiplies it by 1.3. A backslash makes a bracket plain text. ``BREAK`` starts a new chunk of tokens.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from safelight.errors import RequestError

STEP = 1.1
"""Factor by which a bracket changes the weight."""

MOST_WEIGHT = 100.0

MOST_DEPTH = 100

_TOKEN = re.compile(
    r"\\[\\()\[\]]"  # an escaped bracket or backslash
    r"|[()\[\]]"
    r"|:\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*(?=\))"  # a weight before the bracket that ends it
    r"|[^\\()\[\]:]+|[\\:]"
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a prompt with one weight. ``breaks``: a new chunk of tokens starts before it."""

    text: str
    weight: float
    breaks: bool = False


_CLOSES = {")": "(", "]": "["}


def spans(field: str, text: str) -> list[Span]:
    """Split a prompt into parts of one weight each, in order.

    As in AUTOMATIC1111, an unclosed bracket extends to the end, and a closing bracket without an opening one is text:
    see :func:`unbalanced`.
    Raises RequestError, with the position, for a weight beyond :data:`MOST_WEIGHT`, and for more than
    :data:`MOST_DEPTH` nested brackets.
    """
    return _joined(_read(field, text)[0])


_WRITTEN_WEIGHT = re.compile(r"\([^()]*[^\W\d_][^()]*:\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)")
_WRITTEN_EDIT = re.compile(r"\[[^\[\]]*(?:\|[^\[\]]*|:[^\[\]]*:\s*[0-9]*\.?[0-9]+\s*)\]")


def find_written_syntax(text: str) -> str | None:
    """Return the first weight, such as ``(word:1.3)``, or change between steps, such as ``[cat:dog:0.5]`` or
    ``[cat|dog]``, of a prompt; None if there is none.

    Plain brackets do not count: people write them in sentences. Nor does a weight of 1, which changes nothing.
    """
    weight = next((found[0] for found in _WRITTEN_WEIGHT.finditer(text) if float(found["number"]) != 1), None)
    edit = _WRITTEN_EDIT.search(text)
    return weight or (None if edit is None else edit[0])


def unbalanced(text: str) -> list[str]:
    """Return one sentence for each bracket of a prompt that has no match."""
    _, unclosed, unopened = _read("", text)
    warnings = [(at, f"the {text[at]} at character {at} is never closed: it extends to the end") for at in unclosed]
    warnings += [(at, f"the {text[at]} at character {at} closes nothing: it counts as text") for at in unopened]
    return [f"{warning} (write \\{text[at]} for a plain bracket)" for at, warning in sorted(warnings)]


def _read(field: str, text: str) -> tuple[list[list[str | float]], list[int], list[int]]:
    """Return (parts with their weights, positions of unclosed brackets, positions of brackets that close nothing)."""
    parts: list[list[str | float]] = []
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}
    unopened: list[int] = []
    given: float | None = None

    def weigh(first: int, factor: float) -> None:
        for part in parts[first:]:
            part[1] = float(part[1]) * factor

    for found in _TOKEN.finditer(text):
        token = found[0]
        if token in opened:
            if sum(map(len, opened.values())) == MOST_DEPTH:
                raise _problem(field, text, found.start(), f"more than {MOST_DEPTH} nested brackets")
            opened[token].append((found.start(), len(parts)))
        elif token in _CLOSES and opened[_CLOSES[token]]:
            _, first = opened[_CLOSES[token]].pop()
            weigh(first, given if given is not None else STEP if token == ")" else 1 / STEP)
            given = None
        elif found["number"] is not None and opened["("]:
            given = float(found["number"])
            if abs(given) > MOST_WEIGHT:
                raise _problem(field, text, found.start(), f"a weight of {given:g} is over {MOST_WEIGHT:g}")
        else:
            if token in _CLOSES:
                unopened.append(found.start())
            parts.append([token[1] if token[0] == "\\" and len(token) == 2 else token, 1.0])
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        for _, first in opened[bracket]:
            weigh(first, factor)
    return parts, [at for brackets in opened.values() for at, _ in brackets], unopened


def _problem(field: str, text: str, at: int, what: str) -> RequestError:
    near = text[max(0, at - 10) : at + 20]
    return RequestError(field, near, f"at character {at}: {what}")


def _with_has_next(pieces: list[str]) -> list[tuple[bool, str]]:
    """Pair each piece with whether another one follows: (has next, piece)."""
    return [(number + 1 < len(pieces), piece) for number, piece in enumerate(pieces)]


def _joined(parts: list[list[str | float]]) -> list[Span]:
    """Join neighbours of equal weight, then split at ``BREAK``."""
    together: list[tuple[str, float]] = []
    for text, weight in parts:
        if together and together[-1][1] == weight:
            together[-1] = together[-1][0] + str(text), together[-1][1]
        else:
            together.append((str(text), float(weight)))
    out: list[Span] = []
    for text, weight in together:
        first, *rest = _BREAK.split(text)
        if first := first.rstrip() if rest else first:
            out.append(Span(first, weight))
        for has_next, piece in _with_has_next(rest):
            out.append(Span(piece.strip() if has_next else piece.lstrip(), weight, breaks=True))
    return out
