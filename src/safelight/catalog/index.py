"""An index over a folder of records, so that neither lists nor requests parse unchanged records.

A record lists every tensor of a file. A card has only the values that lists show. Cards are cached in memory, and for
the next process in ``index.db`` beside the folder. This file may be deleted at any time; damage to it costs only time.
A record counts as changed if the size, modification time or inode of its file changed. The folder is scanned again if
its own changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from safelight import names
from safelight.catalog.model import Adapter, Model
from safelight.errors import FileError

Kind = TypeVar("Kind", Model, Adapter)

_log = structlog.get_logger(__name__)

VERSION = 1
"""Version of the stored cards. Cards of another version are dropped and created again."""

SETTLED_SECONDS = 0.1
"""Seconds. A folder that changed more recently may change again without a new modification time."""

KEPT_RECORDS = 32
"""Number of whole records cached in memory. A record of an SDXL checkpoint takes about a megabyte."""

Hint = tuple[int, int, int]
"""(modification time in nanoseconds, size in bytes, inode)."""


@dataclass(frozen=True, slots=True)
class Card:
    """A model or adapter without its tensors.

    ``record``: the file of its record.
    ``summary``: the values that ``--json`` prints.
    ``files``: (path, size in bytes, modification time in nanoseconds) of its files, to notice changes.
    ``components``: (role, digest) of each component.
    ``vectors``: shapes of a textual inversion's tensors, by name; None for all other kinds.
    ``problem``: why the record cannot be read; "" if it can.
    """

    name: str
    record: Path
    summary: Mapping[str, Any]
    files: tuple[tuple[str, int, int], ...] = ()
    components: tuple[tuple[str, str], ...] = ()
    vectors: Mapping[str, tuple[int, ...]] | None = None
    problem: str = ""

    @property
    def path(self) -> Path:
        return Path(self.summary["path"])

    @property
    def stem(self) -> str:
        """The name of its file without the suffix. Prompts of other programs use it."""
        folder = str(self.summary["format"]).startswith("diffusers")
        return names.canonical(self.path.name if folder else self.path.stem)

    @property
    def kind(self) -> str:
        return self.summary["kind"]

    @property
    def digest(self) -> str:
        return self.summary["digest"]

    def state(self) -> str:
        """Return ``there``, ``changed`` or ``gone``, from the present sizes and times of its files."""
        for path, size, mtime_ns in self.files:
            try:
                status = os.stat(path)
            except OSError:
                return "gone"
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                return "changed"
        return "there"


def card(record: Path, found: Model | Adapter) -> Card:
    """Return the card of a record."""
    hints = tuple((str(hint.path), hint.size, hint.mtime_ns) for hint in found.manifest.files)
    vectors = None
    if isinstance(found, Adapter) and found.kind == "textual_inversion":
        vectors = {tensor.name: tensor.shape for tensor in found.tensors.tensors}
    components = tuple((component.role, component.digest) for component in found.manifest.components)
    return Card(found.name, record, found.summary(), hints, components, vectors)


class Index(Generic[Kind]):
    """The records in a folder. Several threads and processes may use it at the same time.

    ``folder``: need not exist.
    ``read``: reads one record; raises CorruptFileError.
    ``cache``: the file in which cards are stored.
    ``generation``: a counter that increases with each change of the records.
    """

    def __init__(self, folder: Path, read: Callable[[Path], Kind], cache: Path) -> None:
        self._folder, self._read, self._cache = folder, read, cache
        self._lock = threading.Lock()
        self._stamp: Hint | None = None
        self._known: dict[str, tuple[Hint, Card]] = {}
        self._cards: Mapping[str, Card] = {}
        self._whole: OrderedDict[tuple[str, Hint], Kind] = OrderedDict()
        self.generation = 0

    def cards(self) -> Mapping[str, Card]:
        """Return all cards by name, sorted by name.

        A record that cannot be read has a card under its file's name, with its problem.
        """
        stamp = _hint_of(self._folder)
        if stamp is None:
            return {}
        with self._lock:
            if stamp == self._stamp:
                return self._cards
        young = time.time() - stamp[0] / 1e9 < SETTLED_SECONDS
        known, changed = self._scanned()
        with self._lock:
            if changed or known.keys() != self._known.keys():
                self.generation += 1
            self._known, self._stamp = known, None if young else stamp
            listed = sorted((item for _, item in known.values()), key=lambda item: (item.name.casefold(), item.name))
            self._cards = {item.name: item for item in listed}
            return self._cards

    def get(self, name: str) -> Kind | None:
        """Return the record of a name, None if there is none. Raises CorruptFileError when it is damaged."""
        found = self.cards().get(names.canonical(name))
        return None if found is None else self.whole(found)

    def whole(self, found: Card) -> Kind:
        """Return the whole record of a card. Raises CorruptFileError, UnreadableFileError."""
        key = str(found.record), _hint_of(found.record) or (0, 0, 0)
        with self._lock:
            if key in self._whole:
                self._whole.move_to_end(key)
                return self._whole[key]
        record = self._read(found.record)
        with self._lock:
            self._whole[key] = record
            while len(self._whole) > KEPT_RECORDS:
                self._whole.popitem(last=False)
        return record

    def changed(self) -> None:
        """Scan the folder at the next use, even if its modification time is unchanged."""
        with self._lock:
            self._stamp = None

    def _scanned(self) -> tuple[dict[str, tuple[Hint, Card]], bool]:
        """Scan the folder. Return all cards, and whether any record is new or changed."""
        with self._lock:
            known = dict(self._known)
        current: dict[str, tuple[Hint, Card]] = {}
        missing: list[tuple[str, Hint]] = []
        for name, hint in _listed(self._folder):
            if name in known and known[name][0] == hint:
                current[name] = known[name]
            else:
                missing.append((name, hint))
        stored = self._stored() if missing else {}
        fresh: dict[str, tuple[Hint, Card]] = {}
        for name, hint in missing:
            if name in stored and stored[name][0] == hint:
                current[name] = stored[name]
            else:
                current[name] = fresh[name] = hint, self._card_of(self._folder / name)
        if fresh:
            self._store(fresh, current)
        return current, bool(missing)

    def _card_of(self, record: Path) -> Card:
        try:
            return card(record, self._read(record))
        except FileError as error:
            return Card(record.stem, record, {"path": str(record), "kind": "", "digest": ""}, problem=error.problem)

    def _stored(self) -> dict[str, tuple[Hint, Card]]:
        found: dict[str, tuple[Hint, Card]] = {}
        with contextlib.suppress(sqlite3.Error, ValueError, KeyError, TypeError), self._database() as database:
            rows = database.execute("SELECT file, hint, card FROM cards WHERE folder = ?", (str(self._folder),))
            for file, hint, text in rows:
                values = json.loads(text)
                files = tuple((path, size, mtime) for path, size, mtime in values.pop("files"))
                components = tuple((role, digest) for role, digest in values.pop("components"))
                vectors = values.pop("vectors")
                shapes = None if vectors is None else {name: tuple(shape) for name, shape in vectors.items()}
                mtime, size, inode = json.loads(hint)
                place = self._folder / file
                restored = Card(record=place, files=files, components=components, vectors=shapes, **values)
                found[file] = (mtime, size, inode), restored
        return found

    def _store(self, fresh: Mapping[str, tuple[Hint, Card]], there: Collection[str]) -> None:
        rows = [
            (str(self._folder), file, json.dumps(hint), _text(item))
            for file, (hint, item) in fresh.items()
            if not item.problem
        ]
        try:
            with self._database() as database:
                database.executemany("INSERT OR REPLACE INTO cards VALUES (?, ?, ?, ?)", rows)
                known = {
                    file
                    for (file,) in database.execute("SELECT file FROM cards WHERE folder = ?", (str(self._folder),))
                }
                gone = [(str(self._folder), file) for file in known - set(there)]
                database.executemany("DELETE FROM cards WHERE folder = ? AND file = ?", gone)
        except sqlite3.Error as error:
            _log.warning("cannot store the index of records", file=str(self._cache), why=str(error))

    @contextlib.contextmanager
    def _database(self) -> Generator[sqlite3.Connection]:
        """Open the cache for one use. A file that is not a database, or has another version, is created again."""
        database = sqlite3.connect(self._cache, timeout=10)
        try:
            with database:
                if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                    database.execute("DROP TABLE IF EXISTS cards")
                    database.execute(f"PRAGMA user_version = {VERSION}")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS cards "
                    "(folder TEXT, file TEXT, hint TEXT, card TEXT, PRIMARY KEY (folder, file))"
                )
                yield database
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error):
                self._cache.unlink(missing_ok=True)
            raise
        finally:
            database.close()


def _text(item: Card) -> str:
    values: dict[str, Any] = {
        "name": item.name,
        "summary": dict(item.summary),
        "files": item.files,
        "problem": item.problem,
    }
    values["components"] = item.components
    return json.dumps({**values, "vectors": None if item.vectors is None else dict(item.vectors)})


def _hint_of(path: Path) -> Hint | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _listed(folder: Path) -> Iterator[tuple[str, Hint]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    yield entry.name, (status.st_mtime_ns, status.st_size, status.st_ino)
