"""The full-text index of images, in SQLite (FTS5) and in PostgreSQL (tsvector). Both find the same images.

A text is words of letters and digits, without case and accents. Chinese and Japanese letters count as words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

from sqlalchemy import Connection, TextClause, text

from safelight.queue.search_text import pieces, search_expression, searchable, words

COLUMNS = ("prompt", "names", "tags", "file")

GAP = 100
"""Positions between two columns in PostgreSQL, so that no phrase goes from one into the next."""

MOST_LETTERS = 200
"""PostgreSQL stores no longer words. What is behind these letters is not searched."""


class TextIndex(Protocol):
    """A full-text index. The texts of an image are its prompt, names of model and LoRAs, tags, and name of file."""

    def write(self, connection: Connection, number: int, texts: Sequence[str]) -> None:
        """Write the texts of an image, in place of earlier ones."""
        raise NotImplementedError

    def remove(self, connection: Connection, numbers: Sequence[int]) -> None:
        """Remove the texts of images."""
        raise NotImplementedError

    def finds(self, search: str) -> TextClause:
        """Return the condition for the images that a search finds. A search without a word finds nothing."""
        raise NotImplementedError


_PLACES = ", ".join(f":{name}" for name in COLUMNS)
_SQLITE_ADD = text(f"INSERT INTO image_texts (rowid, {', '.join(COLUMNS)}) VALUES (:number, {_PLACES})")
_SQLITE_REMOVE = text("DELETE FROM image_texts WHERE rowid = :number")


class SqliteTexts:
    """The index in SQLite: a virtual table of FTS5, which the migrations create."""

    def write(self, connection: Connection, number: int, texts: Sequence[str]) -> None:
        """See :class:`TextIndex`."""
        connection.execute(_SQLITE_REMOVE, {"number": number})
        values = dict(zip(COLUMNS, map(searchable, texts), strict=True))
        connection.execute(_SQLITE_ADD, {"number": number, **values})

    def remove(self, connection: Connection, numbers: Sequence[int]) -> None:
        """See :class:`TextIndex`."""
        if numbers:
            connection.execute(_SQLITE_REMOVE, [{"number": number} for number in numbers])

    def finds(self, search: str) -> TextClause:
        """See :class:`TextIndex`."""
        expression = search_expression(search)
        if not expression:
            return text("images.number IN (SELECT 0)")
        matches = text("images.number IN (SELECT rowid FROM image_texts WHERE image_texts MATCH :search)")
        return matches.bindparams(search=expression)


class PostgresTexts:
    """The index in PostgreSQL: a column of type tsvector."""

    create = (
        "CREATE TABLE image_texts (number BIGINT PRIMARY KEY, words TSVECTOR NOT NULL)",
        "CREATE INDEX image_texts_by_word ON image_texts USING gin (words)",
    )

    def write(self, connection: Connection, number: int, texts: Sequence[str]) -> None:
        """See :class:`TextIndex`."""
        found: list[str] = []
        place = 1
        for each in texts:
            for word in _plain(words(each)):
                found.append(f"'{word}':{place}")
                place += 1
            place += GAP
        upsert = (
            "INSERT INTO image_texts (number, words) VALUES (:number, CAST(:words AS tsvector)) "
            "ON CONFLICT (number) DO UPDATE SET words = EXCLUDED.words"
        )
        connection.execute(text(upsert), {"number": number, "words": " ".join(found)})

    def remove(self, connection: Connection, numbers: Sequence[int]) -> None:
        """See :class:`TextIndex`."""
        connection.execute(text("DELETE FROM image_texts WHERE number = ANY(:numbers)"), {"numbers": list(numbers)})

    def finds(self, search: str) -> TextClause:
        """See :class:`TextIndex`."""
        found: list[str] = []
        for each, goes_on in pieces(search):
            quoted = [f"'{word}'" for word in _plain(each)]
            found.append(f"({' <-> '.join(quoted)}{':*' if goes_on else ''})")
        if not found:
            return text("false")
        matches = "images.number IN (SELECT number FROM image_texts WHERE words @@ CAST(:search AS tsquery))"
        return text(matches).bindparams(search=" & ".join(found))


def _plain(found: Sequence[str]) -> Iterator[str]:
    """Yield words without case and accents, as FTS5 stores them."""
    for word in found:
        letters = (letter for letter in unicodedata.normalize("NFD", word) if unicodedata.category(letter) != "Mn")
        yield unicodedata.normalize("NFC", "".join(letters)).lower()[:MOST_LETTERS]
