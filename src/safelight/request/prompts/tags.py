"""Tags in angle brackets: ``<lora:name:0.8>`` requests an adapter, ``<name>`` is a textual inversion.

Only text in the form of a name is a name: ``>_<``, ``<3`` and ``a < b and b > c`` are plain text. Safelight rejects any
other tag, such as ``<hypernet:…>``, by name. It would otherwise end up as words in the prompt.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from safelight.errors import RequestError

ADAPTERS = ("lora", "lyco")
"""The kinds of tags that request an adapter. Both mean the same."""

NAME = r"(?=[\w.+-]*[^\W\d_])\w(?:[\w.+-]*\w)?"
"""Pattern of a name in ``<name>`` that is treated as a textual inversion even if the library has none of that name:
letters of any script, digits and ``. _ + -``, with at least one letter, without spaces."""

INVERSION_TAG = re.compile(rf"<({NAME})>")
TAG = re.compile(r"<([^\W\d]\w*):([^<>]*)>")

_EITHER = re.compile(rf"{TAG.pattern}|{INVERSION_TAG.pattern}|\bembedding:{NAME}")
"""``embedding:NAME`` is ComfyUI's syntax for a textual inversion."""

_LOOSE = re.compile(rf"[<\u2039\uff1c]\s*({'|'.join(ADAPTERS)})\b", re.IGNORECASE)
"""The start of an adapter tag, also with similar brackets or in capitals. Text that matches must be a valid tag."""

_AND = re.compile(r"(?<![\w-])AND(?![\w-])")
"""AUTOMATIC1111's operator that combines prompts. ``AND-gate`` is a plain word."""


def replaced(text: str, change: Callable[[str], str]) -> str:
    """Return the text with ``change`` applied to each of its tags."""
    return _EITHER.sub(lambda tag: change(tag[0]), text)


def refuse_unknown(field: str, text: str, syntax: str) -> None:
    """Raise RequestError, with the position, for unsupported syntax in a prompt: tags of unknown kinds, malformed
    adapter tags, and ``AND``."""
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
            problem = f"at character {loose.start()}: begins like a tag but is none; write <{loose[1].lower()}:NAME:1>"
            raise RequestError(field, near, problem)
    found = _AND.search(text) if syntax == "a1111" else None
    if found is not None:
        near = text[max(0, found.start() - 10) : found.end() + 10]
        problem = f"at character {found.start()}: AND between prompts is not supported; write 'and' for the plain word"
        raise RequestError(field, near, problem)
