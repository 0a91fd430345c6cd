"""Angle brackets in prompts: ``<lora:name:0.8>`` asks for an adapter, ``<name>`` is a textual inversion.

Only what has the form of a name is a name: ``>_<``, ``<3`` and ``a < b and b > c`` are plain text. Whatever else a
prompt asks for in the form of a tag, such as ``<hypernet:…>``, is refused by name instead of being drawn as words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from safelight.errors import RequestError

ADAPTERS = ("lora", "lyco")
"""The kinds of tags that ask for an adapter; both mean the same."""

NAME = r"(?=[\w.+-]*[^\W\d_])\w(?:[\w.+-]*\w)?"
"""What a textual inversion's name looks like where none of that name is known: letters of any script, digits and
``. _ + -``, with at least one letter, without spaces."""

MARK = re.compile(rf"<({NAME})>")
TAG = re.compile(r"<([^\W\d]\w*):([^<>]*)>")

_EITHER = re.compile(rf"{TAG.pattern}|{MARK.pattern}|\bembedding:{NAME}")
"""``embedding:NAME`` is how ComfyUI writes a textual inversion."""

_LOOSE = re.compile(rf"[<\u2039\uff1c]\s*({'|'.join(ADAPTERS)})\b", re.IGNORECASE)
"""What begins as a tag of an adapter; it has to be one."""

_AND = re.compile(r"(?<![\w-])AND(?![\w-])")
"""AUTOMATIC1111's composition of prompts; ``AND-gate`` is a plain word."""


def replaced(text: str, change: Callable[[str], str]) -> str:
    """The text with each of its tags changed."""
    return _EITHER.sub(lambda tag: change(tag[0]), text)


def refuse_unknown(field: str, text: str, syntax: str) -> None:
    """Raise RequestError for what a prompt asks for and nothing here does: tags of unknown kinds, and ``AND``."""
    for tag in TAG.finditer(text):
        kind = tag[1]
        if kind not in ADAPTERS:
            near = difflib.get_close_matches(kind.lower(), ADAPTERS, 1)
            hint = f"; did you mean <{near[0]}:…>?" if near else f"; tags are {', '.join(f'<{k}:…>' for k in ADAPTERS)}"
            raise RequestError(field, tag[0], f"at character {tag.start()}: Safelight has no <{kind}:…>{hint}")
    starts = {tag.start() for tag in TAG.finditer(text)}
    for loose in _LOOSE.finditer(text):
        if loose.start() not in starts:
            near = text[loose.start() : loose.start() + 20]
            problem = f"at character {loose.start()}: begins as a tag and is none; write <{loose[1].lower()}:NAME:1>"
            raise RequestError(field, near, problem)
    found = _AND.search(text) if syntax == "a1111" else None
    if found is not None:
        near = text[max(0, found.start() - 10) : found.end() + 10]
        problem = f"at character {found.start()}: prompts joined by AND cannot be drawn yet; the plain word is 'and'"
        raise RequestError(field, near, problem)
