"""The file of the database: opens it, migrates it to this version, and begins sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from safelight.errors import CorruptFileError, StorageError, UnreadableFileError

FILE = "safelight.db"

BUSY_SECONDS = 30.0
"""Seconds for which one writer waits for another."""


class DatabaseFile:
    """The SQLite file in ``folder``. Opening it creates it, or migrates it to this version.

    ``migrate``: without it, a database of another version is an error, because a server of that version may use it.
    Raises UnreadableFileError when the folder cannot be written, or a newer version wrote the database.
    Raises CorruptFileError when the file is not a database.
    """

    def __init__(self, folder: Path, *, migrate: bool = True) -> None:
        self._path = path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._engine = _open(path, migrate)
        except OSError as error:
            raise UnreadableFileError(folder, f"cannot be written: {error.strerror or error}") from error
        except OperationalError as error:
            raise UnreadableFileError(path, f"cannot be opened: {error.orig}") from error
        except DatabaseError as error:
            raise CorruptFileError(path, f"is not a readable database ({error.orig})") from error

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def session(self) -> Generator[Session]:
        """Open a session. Raises StorageError when the disk is full or cannot be written."""
        try:
            with Session(self._engine) as session:
                yield session
        except OperationalError as error:
            raise StorageError(self._path, f"cannot be written: {error.orig}") from error

    @contextlib.contextmanager
    def writing(self) -> Generator[Session]:
        """Open a session that writes, in one transaction. What it reads, nobody else changes meanwhile.

        Raises StorageError when the disk is full or cannot be written.
        """
        with self.session() as session, session.begin():
            session.execute(text("BEGIN IMMEDIATE"))
            yield session


def _open(path: Path, migrate: bool) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})

    def prepare(connection: DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    event.listen(engine, "connect", prepare)
    try:
        _bring_up_to_date(engine, path, migrate)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _bring_up_to_date(engine: Engine, path: Path, migrate: bool) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    script = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        at = MigrationContext.configure(connection).get_current_revision()
        if at == script.get_current_head():
            return
        if at is not None and at not in {revision.revision for revision in script.walk_revisions()}:
            raise UnreadableFileError(
                path, f"was written by a newer Safelight (revision {at}); use that, or another --root"
            )
        if not migrate:
            raise UnreadableFileError(path, "is of another version, and a server may be using it; stop that server")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
