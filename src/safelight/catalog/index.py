"""An index over a folder of records, so that neither listings nor requests parse unchanged records.

A record lists every tensor of a file. A card has only the values that listings show. Cards are cached in memory, and
for the next process in the index file (:mod:`safelight.catalog.index_file`). A record counts as changed if the size,
modification time or inode of its file changed. The folder is scanned again if one of these changed for the folder
itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from safelight import names
from safelight.catalog.cards import Card, card
from safelight.catalog.index_file import IndexFile, Stamp, stamp_of
from safelight.catalog.model import Adapter, Model
from safelight.errors import FileError

Record = TypeVar("Record", Model, Adapter)

SETTLED_SECONDS = 0.1
"""Seconds. A folder that changed more recently may change again without a new modification time."""

KEPT_RECORDS = 32
"""Number of whole records cached in memory. A record of an SDXL checkpoint takes about a megabyte."""


class Index(Generic[Record]):
    """The records in a folder. Several threads and processes may use it at the same time.

    ``folder``: need not exist.
    ``read``: reads one record; raises CorruptFileError.
    ``file``: where the cards are stored for the next process.
    ``generation``: a counter that increases with each change of the records.
    """

    def __init__(self, folder: Path, read: Callable[[Path], Record], file: IndexFile) -> None:
        self._folder, self._read, self._file = folder, read, file
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._known: dict[str, tuple[Stamp, Card]] = {}
        self._cards: Mapping[str, Card] = {}
        self._records: OrderedDict[tuple[str, Stamp], Record] = OrderedDict()
        self.generation = 0

    def cards(self) -> Mapping[str, Card]:
        """Return all cards by name, sorted by name. Of records with the same name, only one counts.

        A record that cannot be read has a card under its file's name, with its problem.
        """
        self._look()
        return self._cards

    def all(self) -> list[Card]:
        """Return the cards of all records, sorted by file name."""
        self._look()
        with self._lock:
            return [card for _, (_, card) in sorted(self._known.items())]

    def _look(self) -> None:
        """Scan the folder if it changed."""
        stamp = stamp_of(self._folder)
        with self._lock:
            if stamp is not None and stamp == self._stamp:
                return
        young = stamp is None or time.time() - stamp[0] / 1e9 < SETTLED_SECONDS
        known, changed = self._scan()
        with self._lock:
            if changed or known.keys() != self._known.keys():
                self.generation += 1
            self._known, self._stamp = known, None if young else stamp
            listed = sorted((item for _, item in known.values()), key=lambda item: (item.name.casefold(), item.name))
            self._cards = {item.name: item for item in listed}

    def get(self, name: str) -> Record | None:
        """Return the record of a name, None if there is none. Raises CorruptFileError when it is damaged."""
        found = self.cards().get(names.canonical(name))
        return None if found is None else self.read_record(found)

    def read_record(self, found: Card) -> Record:
        """Return the whole record of a card. Raises CorruptFileError, UnreadableFileError."""
        key = str(found.record_path), stamp_of(found.record_path) or (0, 0, 0)
        with self._lock:
            if key in self._records:
                self._records.move_to_end(key)
                return self._records[key]
        record = self._read(found.record_path)
        with self._lock:
            self._records[key] = record
            while len(self._records) > KEPT_RECORDS:
                self._records.popitem(last=False)
        return record

    def invalidate(self) -> None:
        """Scan the folder at the next use, even if its modification time is unchanged."""
        with self._lock:
            self._stamp = None

    def _scan(self) -> tuple[dict[str, tuple[Stamp, Card]], bool]:
        """Scan the folder. Return all cards, and whether any record is new or changed."""
        with self._lock:
            known = dict(self._known)
        current: dict[str, tuple[Stamp, Card]] = {}
        missing: list[tuple[str, Stamp]] = []
        for name, stamp in _list(self._folder):
            if name in known and known[name][0] == stamp:
                current[name] = known[name]
            else:
                missing.append((name, stamp))
        stored = self._file.cards(self._folder) if missing else {}
        fresh: dict[str, tuple[Stamp, Card]] = {}
        for name, stamp in missing:
            if name in stored and stored[name][0] == stamp:
                current[name] = stored[name]
            else:
                current[name] = fresh[name] = stamp, self._card_of(self._folder / name)
        if fresh:
            self._file.store(self._folder, fresh, current)
        return current, bool(missing)

    def _card_of(self, record: Path) -> Card:
        try:
            return card(record, self._read(record))
        except FileError as error:
            return Card(record.stem, record, {"path": str(record), "kind": "", "digest": ""}, problem=error.problem)


def _list(folder: Path) -> Iterator[tuple[str, Stamp]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    yield entry.name, (status.st_mtime_ns, status.st_size, status.st_ino)
