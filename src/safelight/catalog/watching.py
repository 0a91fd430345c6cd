"""Follows folders: what appears in them is imported, and what goes is taken from the list of imported files.

The folders are read again every few seconds, because the systems' ways to tell of changes do not work on every disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.catalog import other_programs
from safelight.catalog.catalog import Catalog
from safelight.catalog.importing import import_files
from safelight.catalog.lock import library_lock
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
    """The names of the models and adapters that appeared or disappeared."""

    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class FolderWatcher:
    """Follows ``folders``, each of them a program's or a plain one, as for `safelight import`.

    ``tell``: called in the watcher's thread after something changed.
    """

    def __init__(self, folders: Sequence[Path], catalog: Catalog, tell: Callable[[Changes], None]) -> None:
        self._folders, self._catalog, self._tell = folders, catalog, tell
        self._done: dict[Path, dict[str, Stamp]] = {folder: {} for folder in folders}
        """Of each folder: the files that were imported or refused."""
        self._seen: dict[str, Stamp] = {}
        """What the last look saw."""
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
        seen: dict[str, Stamp] = {}
        added: list[str] = []
        gone: list[str] = []
        for folder in self._folders:
            try:
                candidates = other_programs.read(folder).candidates
            except SafelightError as error:
                # An unmounted disk is no reason to forget what is on it.
                self._complain(folder, str(error))
                continue
            done = self._done[folder]
            if not candidates and done:
                self._complain(folder, "is empty now; what was in it is kept, because its disk may be absent")
                continue
            self._complain(folder, "")
            present = {str(one.found.path): stamp for one in candidates if (stamp := _stamp(one.found.path))}
            seen |= present
            new = [one for one in candidates if self._is_new(str(one.found.path), present, done)]
            for one in import_files(new, self._catalog, lambda _: ""):
                if one.state == "imported":
                    added.append(one.name)
                elif one.state == "refused":
                    _log.info("a file in a watched folder is not used", file=str(one.path), why=one.note)
            done |= {str(one.found.path): present[str(one.found.path)] for one in new}
            gone += self._forget([path for path in done if path not in present and _is_deleted(Path(path))], done)
        self._seen = seen
        return Changes(tuple(added), tuple(gone))

    def _is_new(self, path: str, present: Mapping[str, Stamp], done: Mapping[str, Stamp]) -> bool:
        """Return whether a file is new or changed, and is not being written.

        It was written a while ago, or is the same as at the last look; a time in the future says nothing.
        """
        stamp = present.get(path)
        return stamp is not None and done.get(path) != stamp and (_is_old(stamp) or self._seen.get(path) == stamp)

    def _forget(self, paths: Iterable[str], done: dict[str, Stamp]) -> list[str]:
        """Remove files that no longer exist from the list of imported files. A model that was read keeps its record."""
        unread, names = self._catalog.library.unread, list[str]()
        for path in paths:
            del done[path]
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
            except Exception as error:  # noqa: BLE001 - the thread would end, and nobody would follow the folders
                _log.warning("watched folders could not be followed", why=f"{type(error).__name__}: {error}")
            if self._stopping.wait(SECONDS):
                return


def _stamp(path: Path) -> Stamp | None:
    """Return the size and time of a file or folder; None if it went."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _is_deleted(path: Path) -> bool:
    """Return whether a file was deleted. If its folder is missing or empty, its disk may be absent."""
    try:
        with os.scandir(path.parent) as entries:
            return not path.exists() and next(entries, None) is not None
    except OSError:
        return False


def _is_old(stamp: Stamp) -> bool:
    return time.time() - stamp[1] / 1e9 > SETTLED_SECONDS
