"""SQLite's database: opens its file, and migrates it to this version."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError, OperationalError

from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.queue.sql_database import SqlDatabase, migrate_to_newest
from safelight.queue.text_index import SqliteTexts

FILE = "safelight.db"

MORE_CONNECTIONS = 60
"""More than threads that answer requests, so that none waits for another's connection."""

BUSY_SECONDS = 30.0
"""Seconds for which one writer waits for another."""


def open_file(folder: Path, *, migrate: bool = True) -> SqlDatabase:
    """Open the SQLite file in ``folder``. This creates it, or migrates it to this version.

    ``migrate``: see :func:`migrate_to_newest`.
    Raises UnreadableFileError when the folder cannot be written, or a newer version wrote the database.
    Raises CorruptFileError when the file is not a database.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        engine = _open(path, migrate)
    except OSError as error:
        raise UnreadableFileError(folder, f"cannot be written: {error.strerror or error}") from error
    except OperationalError as error:
        raise UnreadableFileError(path, f"cannot be opened: {error.orig}") from error
    except DatabaseError as error:
        raise CorruptFileError(path, f"is not a readable database ({error.orig})") from error
    return SqlDatabase(engine, path, SqliteTexts(), "BEGIN IMMEDIATE")


def _open(path: Path, migrate: bool) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        max_overflow=MORE_CONNECTIONS,
    )

    # A migration makes tables again that others refer to, and dropping one counts as deleting its rows.
    foreign_keys = "OFF"

    def prepare(connection: DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"foreign_keys={foreign_keys}"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    event.listen(engine, "connect", prepare)
    try:
        with engine.begin() as connection:
            migrate_to_newest(connection, path, migrate)
    finally:
        # Connections have this setting from their start.
        engine.dispose()
    foreign_keys = "ON"
    return engine
