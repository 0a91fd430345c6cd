"""Prepares texts and searches for a full-text index."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LETTERS_WITHOUT_SPACES = re.compile(
    "([\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003134f])"
)
"""Chinese and Japanese texts have no spaces between words, so each letter counts as a word."""


def searchable(text: str) -> str:
    """Return a text with spaces between its words."""
    return _LETTERS_WITHOUT_SPACES.sub(r" \1 ", text)


def words(text: str) -> list[str]:
    """Return the words of a text: letters and digits, in the order of the text."""
    return re.findall(r"[^\W_]+", searchable(text))


def pieces(search: str) -> Iterator[tuple[list[str], bool]]:
    """Yield what a search looks for: words that follow each other, and whether the last of them may go on.

    Quotation marks around several words find them in this order. Everything else is text: the search has no operators.
    """
    for quoted, plain in re.findall(r'"([^"]*)"|([^\s"]+)', search):
        found = words(quoted or plain)
        if found:
            yield found, not quoted


def search_expression(search: str) -> str:
    """Return FTS5's expression for the texts with all pieces of a search; "" for a search without a word."""
    # The star means that the last word may go on.
    return " AND ".join(f'"{" ".join(found)}"{" *" if goes_on else ""}' for found, goes_on in pieces(search))
