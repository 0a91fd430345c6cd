"""PostgreSQL's database: connects to its server, and creates the tables."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

from alembic import command
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from safelight import extras
from safelight.errors import InputError, StorageError, UnreadableFileError
from safelight.queue.sql_database import SqlDatabase, migrate_to_newest, revision_of, revisions
from safelight.queue.tables import Table
from safelight.queue.text_index import PostgresTexts

WRITERS, SERVER, MIGRATION = 0x5AFE0001, 0x5AFE0002, 0x5AFE0003
"""The keys of PostgreSQL's advisory locks: of who writes, of the server that uses the database, of a migration."""

CONNECTIONS, MORE_CONNECTIONS = 5, 60
"""Connections that stay open, and how many more may be opened: one for each thread of the server."""

CONNECT_SECONDS = 10


def open_server(url: str, *, migrate: bool = True) -> SqlDatabase:
    """Connect to a database of PostgreSQL. This creates its tables, or migrates them to this version.

    ``url``: ``postgresql://USER:PASSWORD@HOST:PORT/NAME``.
    ``migrate``: see :func:`migrate_to_newest`.
    Raises InputError for another kind of address, UnreadableFileError if the server does not answer or refuses, or a
    newer version wrote the database, and MissingExtraError without the extra ``postgres``.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InputError("database_url: is not an address such as postgresql://user:password@host/name") from error
    if parsed.get_backend_name() != "postgresql":
        raise InputError(
            f"database_url: {parsed.get_backend_name()} is not supported; it must begin with postgresql://"
        )
    extras.require("postgres", "the setting database_url")
    place = Path(f"PostgreSQL at {parsed.host or 'localhost'}/{parsed.database or ''}")
    engine = create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        connect_args={"connect_timeout": CONNECT_SECONDS},
        pool_size=CONNECTIONS,
        max_overflow=MORE_CONNECTIONS,
        # A connection may have ended while nobody used it, for example because the server was started again.
        pool_pre_ping=True,
        json_serializer=_to_json,
    )
    try:
        with engine.begin() as connection:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION})"))
            _bring_up_to_date(connection, place, migrate)
    except OperationalError as error:
        engine.dispose()
        raise UnreadableFileError(place, f"cannot be opened: {str(error.orig).strip()}") from error
    except DBAPIError as error:
        engine.dispose()
        raise UnreadableFileError(place, f"its tables cannot be created: {str(error.orig).strip()}") from error
    except BaseException:
        engine.dispose()
        raise
    return SqlDatabase(engine, place, PostgresTexts(), f"SELECT pg_advisory_xact_lock({WRITERS})")


class Claim:
    """The claim of one Safelight server on a database: an advisory lock, which belongs to one connection.

    Raises InputError if another server has it.
    """

    def __init__(self, database: SqlDatabase) -> None:
        self._engine, self._place = database.engine, database.place
        self._lock = Lock()
        self._connection: Connection | None = None
        if not self._take():
            raise InputError(f"another Safelight server uses {self._place}; stop it, or name another database")

    def check(self) -> None:
        """Take the claim again if it was lost with its connection, for example because PostgreSQL was started again.

        Raises StorageError if another Safelight server has it now, and OperationalError if PostgreSQL does not answer.
        """
        with self._lock:
            if not self._is_held() and not self._take():
                raise StorageError(
                    self._place,
                    "another Safelight server claimed it while this one had lost its connection; stop one of them",
                )

    def close(self) -> None:
        """Give the claim back."""
        with self._lock:
            self._drop()

    def _is_held(self) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.execute(text("SELECT 1"))
            self._connection.commit()
        except DBAPIError:
            self._drop()
            return False
        return True

    def _take(self) -> bool:
        connection = self._engine.connect()
        if connection.execute(text(f"SELECT pg_try_advisory_lock({SERVER})")).scalar():
            # The lock belongs to the connection; its transaction may end.
            connection.commit()
            self._connection = connection
            return True
        connection.close()
        return False

    def _drop(self) -> None:
        if self._connection is not None:
            # The connection is ended, not kept for others: they would have its lock.
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def _bring_up_to_date(connection: Connection, place: Path, migrate: bool) -> None:
    if revision_of(connection) is not None:
        migrate_to_newest(connection, place, migrate)
        return
    # Earlier revisions were for SQLite alone.
    Table.metadata.create_all(connection)
    for statement in PostgresTexts.create:
        connection.execute(text(statement))
    config, newest, _ = revisions()
    config.attributes["connection"] = connection
    command.stamp(config, newest)


def _to_json(value: Any) -> str:
    """Return a value as JSON. Raises InputError for a NUL character, which PostgreSQL cannot read again."""
    encoded = json.dumps(value)
    if "\\u0000" in encoded and _has_nul(value):
        raise InputError("a text has a NUL character, which the database cannot store")
    return encoded


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(one) for pair in value.items() for one in pair)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return isinstance(value, list | tuple) and any(map(_has_nul, value))  # pyright: ignore[reportUnknownArgumentType]
