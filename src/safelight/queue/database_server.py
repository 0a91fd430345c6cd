"""PostgreSQL's database: connects to its server, and creates the tables."""

from __future__ import annotations

import json
import time
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

NETWORK = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Parameters of libpq: a connection whose other side is silent is lost after half a minute, not after hours."""

END_SECONDS = 5.0
"""Seconds to wait until PostgreSQL has released the lock of a connection that Safelight ended."""

OWN = "SELECT pid, backend_start AS start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
END_OWN = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND backend_start = :start"
"""Names PostgreSQL's process of this connection, and ends the one that was named so."""


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
        connect_args=NETWORK,
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
        self._backend: dict[str, Any] | None = None
        self._closed = False
        if not self._take():
            raise InputError(f"another Safelight server uses {self._place}; stop it, or name another database")

    def check(self) -> None:
        """Take the claim again if it was lost with its connection, for example because PostgreSQL was started again.

        Raises StorageError if another Safelight server has it now, or this claim was given back. Raises
        OperationalError if PostgreSQL does not answer.
        """
        with self._lock:
            if self._closed:
                raise StorageError(self._place, "is closed")
            if not self._is_held() and not self._take():
                raise StorageError(
                    self._place,
                    "another Safelight server claimed it while this one had lost its connection; stop one of them",
                )

    def close(self) -> None:
        """Give the claim back."""
        with self._lock:
            self._closed = True
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
        try:
            # PostgreSQL may not know yet that the earlier claim's connection is lost. Then that still has the lock.
            ended = self._backend is not None and connection.execute(text(END_OWN), self._backend).scalar()
            until = time.monotonic() + (END_SECONDS if ended else 0.0)
            while not (taken := connection.execute(text(f"SELECT pg_try_advisory_lock({SERVER})")).scalar()):
                if time.monotonic() >= until:
                    break
                time.sleep(0.05)
            if taken:
                self._backend = dict(connection.execute(text(OWN)).mappings().one())
                # The lock belongs to the connection; its transaction may end.
                connection.commit()
                self._connection = connection
                return True
        except BaseException:
            # It may have the lock.
            connection.invalidate()
            connection.close()
            raise
        connection.close()
        return False

    def _drop(self) -> None:
        if self._connection is not None:
            # The connection is ended, not kept for others: they would have its lock.
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def _bring_up_to_date(connection: Connection, place: Path, migrate: bool) -> None:
    at = revision_of(connection)
    if at is not None:
        # A server that uses it, perhaps with another root, has the lock.
        free = at == revisions()[1] or connection.execute(text(f"SELECT pg_try_advisory_xact_lock({SERVER})")).scalar()
        migrate_to_newest(connection, place, migrate and bool(free))
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
