"""Follows folders: what appears in them is imported, and what goes is taken from the list of imported files.

The folders are read again every few seconds, because the systems' ways to tell of changes do not work on every disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.catalog import other_programs
from safelight.catalog.catalog import Catalog
from safelight.catalog.importing import import_files
from safelight.catalog.lock import library_lock
from safelight.catalog.other_programs import Candidate
from safelight.errors import SafelightError
from safelight.logs import Log

_log = Log(__name__)

SECONDS = 10.0
"""Seconds between two looks at the folders. Among 1,000 files, one takes about 0.1 s."""

SETTLED_SECONDS = 5.0
"""A file that was written less than this ago may not be complete."""

Stamp = tuple[int, int]
"""A file's size and time."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The names of models and adapters that appeared, and of those that went."""

    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class FolderWatcher:
    """Follows ``folders``, each of them a program's or a plain one, as for `safelight import`.

    ``tell``: called in the watcher's thread after something changed.
    """

    def __init__(self, folders: Sequence[Path], catalog: Catalog, tell: Callable[[Changes], None]) -> None:
        self._folders, self._catalog, self._tell = folders, catalog, tell
        self._done: dict[str, Stamp] = {}
        self._complaints: dict[Path, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="safelight-watch", daemon=True)

    def start(self) -> None:
        """Begin to follow the folders. Without any, do nothing."""
        if self._folders:
            self._thread.start()

    def stop(self) -> None:
        """End, after the present look."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> Changes:
        """Look at the folders once. Import what is new or changed, and forget what is gone."""
        present: dict[str, Stamp] = {}
        new: list[Candidate] = []
        complete = True
        for folder in self._folders:
            try:
                candidates = other_programs.read(folder).candidates
            except SafelightError as error:
                # An unmounted disk is no reason to forget what is on it.
                complete = False
                self._complain(folder, str(error))
                continue
            self._complain(folder, "")
            for candidate in candidates:
                stamp = _stamp(candidate.found.path)
                if stamp is not None:
                    present[str(candidate.found.path)] = stamp
                    if self._done.get(str(candidate.found.path)) != stamp and _is_settled(stamp):
                        new.append(candidate)
        added: list[str] = []
        for one in import_files(new, self._catalog, lambda _: ""):
            if one.state == "imported":
                added.append(one.name)
            elif one.state == "refused":
                _log.info("a file in a watched folder is not used", file=str(one.path), why=one.note)
        self._done |= {str(one.found.path): present[str(one.found.path)] for one in new}
        gone = self._forget([path for path in self._done if path not in present]) if complete else ()
        return Changes(tuple(added), tuple(gone))

    def _forget(self, paths: Iterable[str]) -> list[str]:
        """Take files that are gone from the list of imported ones. Those that were read keep their records."""
        unread, names = self._catalog.library.unread, list[str]()
        for path in paths:
            del self._done[path]
            with library_lock(self._catalog.library.root):
                listed = unread.find_path(Path(os.path.normpath(Path(path).absolute())))
                if listed is not None and unread.forget(Path(listed.path)):
                    names.append(listed.name)
        return names

    def _complain(self, folder: Path, why: str) -> None:
        """Log why a folder cannot be read, once."""
        if why and self._complaints.get(folder) != why:
            _log.warning("a watched folder cannot be read", folder=str(folder), why=why)
        self._complaints[folder] = why

    def _run(self) -> None:
        while True:
            try:
                changes = self.look()
                if changes != Changes():
                    self._tell(changes)
            except (SafelightError, OSError) as error:
                _log.warning("watched folders could not be followed", why=str(error))
            if self._stopping.wait(SECONDS):
                return


def _stamp(path: Path) -> Stamp | None:
    """Return the size and time of a file or folder; None if it went."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _is_settled(stamp: Stamp) -> bool:
    return time.time() - stamp[1] / 1e9 > SETTLED_SECONDS
