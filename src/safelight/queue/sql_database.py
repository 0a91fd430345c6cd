"""An open database, SQLite's or PostgreSQL's, and its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, InternalError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as NoConnectionError
from sqlalchemy.orm import Session

from safelight.errors import InputError, StorageError, UnreadableFileError
from safelight.queue.text_index import TextIndex


class SqlDatabase:
    """A database of the newest revision.

    ``place``: where it is, for errors.
    ``texts``: its full-text index.
    ``begin``: the statement after which no other transaction that began with it writes until this one ends.
    """

    def __init__(self, engine: Engine, place: Path, texts: TextIndex, begin: str) -> None:
        self.engine, self.place, self.texts, self._begin = engine, place, texts, text(begin)
        self.before_writing: Callable[[], None] = lambda: None
        """Is called in each transaction that writes, before its first change; if it raises, nothing is written."""

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def session(self) -> Generator[Session]:
        """Open a session.

        Raises the errors of :meth:`connection`.
        """
        with self._errors(), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def writing(self) -> Generator[Session]:
        """Open a session that writes, in one transaction. What it reads, nobody else changes meanwhile.

        Raises the errors of :meth:`connection`.
        """
        with self.session() as session, session.begin():
            self._begin_writing(session.connection())
            yield session

    @contextlib.contextmanager
    def connection(self) -> Generator[Connection]:
        """Open a connection, for statements that are built already: a session takes several times longer.

        Raises StorageError when the disk is full or cannot be written, or the database's server does not answer.
        Raises InputError for a text that the database cannot store.
        """
        with self._errors(), self.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def transaction(self) -> Generator[Connection]:
        """Open a connection that writes, in one transaction. See :meth:`writing` and :meth:`connection`."""
        with self.connection() as connection, connection.begin():
            self._begin_writing(connection)
            yield connection

    def _begin_writing(self, connection: Connection) -> None:
        connection.execute(self._begin)
        # It waited for others who write. Who claims the database from now on writes after this transaction.
        self.before_writing()

    @contextlib.contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except (OperationalError, InternalError) as error:
            # InternalError: a server of PostgreSQL that has become read-only, for example.
            raise StorageError(self.place, f"cannot be used: {error.orig}") from error
        except NoConnectionError as error:
            raise StorageError(self.place, f"is too busy: {error}") from error
        except DataError as error:
            raise InputError(f"the database cannot store a text or number: {error.orig}") from error
        except StatementError as error:
            # A value of ours was refused before it came to the database.
            if isinstance(error.orig, InputError):
                raise error.orig from error
            raise


def revisions() -> tuple[Config, str, frozenset[str]]:
    """Return the configuration of the migrations, the newest revision, and all revisions."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    script = ScriptDirectory.from_config(config)
    return config, script.get_current_head() or "", frozenset(one.revision for one in script.walk_revisions())


def revision_of(connection: Connection) -> str | None:
    """Return the revision of a database; None if it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def migrate_to_newest(connection: Connection, place: Path, migrate: bool) -> None:
    """Bring a database up to date.

    ``migrate``: without it, a database of another version is an error, because a server of that version may use it.
    Raises UnreadableFileError if a newer version wrote it.
    """
    config, newest, known = revisions()
    at = revision_of(connection)
    if at == newest:
        return
    if at is not None and at not in known:
        problem = f"was written by a newer Safelight (revision {at}); use that, or another --root"
        raise UnreadableFileError(place, problem)
    if not migrate:
        raise UnreadableFileError(place, "is of another version, and a server may be using it; stop that server")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
