"""Copies a whole database: from SQLite to PostgreSQL, or back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session

from safelight.errors import InputError
from safelight.queue.image_table import index_texts
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.tables import ImageRow, Table
from safelight.queue.text_index import TextIndex

AT_ONCE = 500
"""Rows of one statement."""


def copy_database(source: SqlDatabase, target: SqlDatabase) -> int:
    """Copy all rows into an empty database, all or none, as of one moment. Return their number.

    Both databases are of the newest revision. A server may use the source.
    Raises InputError if the target has rows.
    """
    copied = 0
    with source.session() as there, target.writing() as here:
        # What a server writes meanwhile is not seen.
        level = "REPEATABLE READ" if source.engine.dialect.name == "postgresql" else "SERIALIZABLE"
        there.connection(execution_options={"isolation_level": level})
        for table in Table.metadata.sorted_tables:
            if here.execute(select(func.count()).select_from(table)).scalar_one():
                raise InputError(f"{target.place} has data already ({table.name}); use an empty database")
            for rows in _parts(there, table):
                here.execute(insert(table), rows)
                copied += len(rows)
        _index(here, target.texts)
        if target.engine.dialect.name == "postgresql":
            _count_on(here)
    return copied


def _parts(session: Session, table: Any) -> Iterator[list[Mapping[str, Any]]]:
    result = session.execute(select(table).execution_options(yield_per=AT_ONCE))
    for rows in result.mappings().partitions(AT_ONCE):
        yield [dict(row) for row in rows]


def _index(session: Session, texts: TextIndex) -> None:
    """Write the texts of all images into the full-text index."""
    numbers = list(session.scalars(select(ImageRow.number)))
    for at in range(0, len(numbers), AT_ONCE):
        for row in session.scalars(select(ImageRow).where(ImageRow.number.in_(numbers[at : at + AT_ONCE]))):
            index_texts(session, row, texts)
        session.expunge_all()


def _count_on(session: Session) -> None:
    """Let PostgreSQL number new rows from behind those that were copied with their numbers."""
    for table in Table.metadata.sorted_tables:
        if "number" in table.columns:
            sequence = f"pg_get_serial_sequence('{table.name}', 'number')"
            most = f"(SELECT max(number) FROM {table.name})"
            session.execute(text(f"SELECT setval({sequence}, {most}) WHERE {most} IS NOT NULL"))
