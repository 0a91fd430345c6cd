"""The index file ``ROOT/index.db``: a cache of records, components, and sizes of input images, in SQLite.

The records in the folders are the truth. The index may be deleted at any time; damage to it costs only time. Tables:

- ``records``: the card of each record of a model or adapter, by folder and file
- ``components``: the components of each record, by digest; several records may have the same component
- ``inputs``: width and height of input images, by digest
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Collection, Generator, Mapping
from pathlib import Path

from safelight.catalog.cards import Card
from safelight.logs import Log

_log = Log(__name__)

VERSION = 4
"""Version of the tables. A file of another version is created again."""

_TABLES = """
DROP TABLE IF EXISTS cards;
DROP TABLE IF EXISTS components;
DROP TABLE IF EXISTS records;
DROP TABLE IF EXISTS inputs;
CREATE TABLE records (folder TEXT, file TEXT, hint TEXT, card TEXT, PRIMARY KEY (folder, file));
CREATE TABLE components (
    folder TEXT, file TEXT, place INTEGER, role TEXT, digest TEXT,
    PRIMARY KEY (folder, file, place),
    FOREIGN KEY (folder, file) REFERENCES records (folder, file) ON DELETE CASCADE
);
CREATE TABLE inputs (digest TEXT PRIMARY KEY, hint TEXT, width INTEGER, height INTEGER);
"""

_CARDS = """
SELECT file, hint, card, (
    SELECT json_group_array(json_array(role, digest)) FROM (
        SELECT role, digest FROM components
        WHERE components.folder = records.folder AND components.file = records.file ORDER BY place
    )
) FROM records WHERE folder = ?
"""

Stamp = tuple[int, int, int]
"""(modification time in nanoseconds, size in bytes, inode) of a file."""


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file or folder; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class IndexFile:
    """The index file at ``path``. It need not exist.

    If the database fails, reading methods find nothing, so that the caller reads the records and images instead.
    ``store`` and ``store_input`` log a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def cards(self, folder: Path) -> dict[str, tuple[Stamp, Card]]:
        """Return the stored cards of a folder, each with the stamp of its record, by the record's file name."""
        found: dict[str, tuple[Stamp, Card]] = {}
        with contextlib.suppress(sqlite3.Error, ValueError, KeyError, TypeError), self._database() as database:
            for file, stamp, text, parts in database.execute(_CARDS, (str(folder),)):
                mtime, size, inode = json.loads(stamp)
                components = tuple((role, digest) for role, digest in json.loads(parts))
                found[file] = (mtime, size, inode), _card(folder / file, text, components)
        return found

    def store(self, folder: Path, fresh: Mapping[str, tuple[Stamp, Card]], there: Collection[str]) -> None:
        """Store cards of a folder.

        ``there``: the file names of all its records; rows of other files are deleted from the index.
        """
        home = str(folder)
        readable = {file: each for file, each in fresh.items() if not each[1].problem}
        parts = [
            (home, file, index, role, digest)
            for file, (_, card) in readable.items()
            for index, (role, digest) in enumerate(card.components)
        ]
        try:
            with self._database() as database:
                known = {file for (file,) in database.execute("SELECT file FROM records WHERE folder = ?", (home,))}
                old = [(home, file) for file in (known - set(there)) | readable.keys()]
                database.executemany("DELETE FROM records WHERE folder = ? AND file = ?", old)
                database.executemany(
                    "INSERT INTO records VALUES (?, ?, ?, ?)",
                    [(home, file, json.dumps(stamp), _text(card)) for file, (stamp, card) in readable.items()],
                )
                database.executemany("INSERT INTO components VALUES (?, ?, ?, ?, ?)", parts)
        except sqlite3.Error as error:
            _log.warning("cannot store the index of records", file=str(self._path), why=str(error))

    def input_size(self, digest: str, stamp: Stamp) -> tuple[int, int] | None:
        """Return (width, height) of an input image in pixels; None if its file is not the one that was stored."""
        query = "SELECT width, height FROM inputs WHERE digest = ? AND hint = ?"
        with contextlib.suppress(sqlite3.Error), self._database() as database:
            return database.execute(query, (digest, json.dumps(stamp[1:]))).fetchone()
        return None

    def store_input(self, digest: str, stamp: Stamp, size: tuple[int, int]) -> None:
        """Store (width, height) of an input image.

        The file is recognised by size and inode only, because each use of an image sets its file's modification time.
        """
        row = (digest, json.dumps(stamp[1:]), *size)
        try:
            with self._database() as database:
                database.execute("INSERT OR REPLACE INTO inputs VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            _log.warning("cannot store the size of an input image", file=str(self._path), why=str(error))

    def forget_inputs(self, digests: Collection[str]) -> None:
        """Delete the rows of input images that were removed."""
        with contextlib.suppress(sqlite3.Error), self._database() as database:
            database.executemany("DELETE FROM inputs WHERE digest = ?", [(digest,) for digest in digests])

    @contextlib.contextmanager
    def _database(self) -> Generator[sqlite3.Connection]:
        """Open the file for one use. A file that is not a database, or has another version, is created again."""
        database = sqlite3.connect(self._path, timeout=10)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                database.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
            with database:
                yield database
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error):
                self._path.unlink(missing_ok=True)
            raise
        finally:
            database.close()


def _card(record: Path, text: str, components: tuple[tuple[str, str], ...]) -> Card:
    values = json.loads(text)
    files = tuple((path, size, mtime) for path, size, mtime in values.pop("files"))
    vectors = values.pop("vectors")
    shapes = None if vectors is None else {name: tuple(shape) for name, shape in vectors.items()}
    return Card(record_path=record, files=files, components=components, vectors=shapes, **values)


def _text(card: Card) -> str:
    vectors = None if card.vectors is None else dict(card.vectors)
    values = {"name": card.name, "summary": dict(card.summary), "files": card.files, "problem": card.problem}
    return json.dumps({**values, "vectors": vectors})
