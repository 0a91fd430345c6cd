"""Prepares texts and searches for SQLite's full-text index (FTS5, tokenizer unicode61)."""

from __future__ import annotations

import re

_LETTERS_WITHOUT_SPACES = re.compile(
    "([\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003134f])"
)
"""Chinese and Japanese texts have no spaces between words, so each letter counts as a word."""


def searchable(text: str) -> str:
    """Return a text as the index stores it."""
    return _LETTERS_WITHOUT_SPACES.sub(r" \1 ", text)


def search_expression(search: str) -> str:
    """Return the expression that finds texts with all words of a search, each at the beginning of a word.

    Quotation marks around several words find them in this order. Everything else is text: the search has no operators.
    Returns "" for a search without a word.
    """
    found: list[str] = []
    for quoted, plain in re.findall(r'"([^"]*)"|([^\s"]+)', search):
        words = _words(quoted or plain)
        if words:
            # The star means that the last word may go on.
            found.append('"' + " ".join(words) + ('"' if quoted else '" *'))
    return " AND ".join(found)


def _words(text: str) -> list[str]:
    """Return the words of a text: what is between signs that unicode61 takes for spaces."""
    return re.findall(r"[^\W_]+", searchable(text))
