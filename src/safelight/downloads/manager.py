"""The downloads of a server: they go on in the background, and after a restart where they stopped."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from safelight.catalog.file_hashes import FileHashes
from safelight.catalog.library import Library
from safelight.downloads import sources
from safelight.downloads.adding import add
from safelight.downloads.connection import open_client
from safelight.downloads.download import DownloadProgress, download_all
from safelight.downloads.sources import RepositoryChoice
from safelight.downloads.wanted import Wanted
from safelight.errors import Cancelled, SafelightError, StorageError, UnreadableFileError
from safelight.files.disk import write_whole
from safelight.logs import Log

_log = Log(__name__)

FOLDER = ".downloads"
"""In the root: a record for each download."""

AT_ONCE = 2

MOST_KEPT = 200
"""Ended downloads whose records are kept."""

SECONDS_BETWEEN_EVENTS = 0.5

State = Literal["queued", "running", "adding", "done", "failed", "cancelled"]

ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Download:
    """A download.

    ``source``: as the client wrote it.
    ``name``, ``variant``: of the model in the library; "" for its own.
    ``title``, ``notes``: what the source says.
    ``done``, ``total``: bytes; the total is None while it is unknown.
    ``rate``: bytes per second.
    ``seconds_left``: None if it is unknown.
    ``added``: the names in the library.
    ``problem``: why it failed, or why a file was not added; "" if nothing went wrong.
    ``created``: seconds since 1970.
    """

    id: str
    source: str
    choice: RepositoryChoice
    name: str
    variant: str
    created: float
    state: State = "queued"
    title: str = ""
    notes: tuple[str, ...] = ()
    done: int = 0
    total: int | None = None
    rate: float = 0.0
    seconds_left: float | None = None
    added: tuple[str, ...] = ()
    problem: str = ""


_RECORD = TypeAdapter(Download)


class Downloads:
    """Runs downloads, and stores their records.

    ``allowed``: the setting ``download_hosts``.
    ``tell``: called with each change.
    """

    def __init__(
        self, root: Path, folder: Path, library: Library, allowed: tuple[str, ...], tell: Callable[[Download], None]
    ) -> None:
        self._records, self._folder, self._library = root / FOLDER, folder, library
        self._allowed, self._tell = allowed, tell
        self._hashes = FileHashes(root)
        self._lock = threading.Lock()
        self._all: dict[str, Download] = self._read_records()
        self._cancelled: set[str] = set()
        self._stopping = False
        self._pool = ThreadPoolExecutor(AT_ONCE, "safelight-downloads")
        # A lock of the library serves processes; within this one, models are added one after the other.
        self._adding = threading.Lock()

    def start(self) -> None:
        """Continue the downloads that were not finished when the server stopped."""
        for one in sorted(self._all.values(), key=lambda one: one.created):
            if one.state not in ENDED:
                self._change(replace(one, state="queued", rate=0.0, seconds_left=None))
                self._pool.submit(self._run, one.id)

    def begin(self, source: str, choice: RepositoryChoice, name: str = "", variant: str = "") -> Download:
        """Queue a download and return it at once. Raises DownloadError for a text that is no source."""
        sources.read_parts(source, choice)
        made = Download(uuid.uuid4().hex, source, choice, name, variant, time.time())
        self._change(made)
        self._pool.submit(self._run, made.id)
        return made

    def all(self) -> list[Download]:
        """Return the downloads, the newest first."""
        with self._lock:
            return sorted(self._all.values(), key=lambda one: one.created, reverse=True)

    def find(self, identifier: str) -> Download | None:
        with self._lock:
            return self._all.get(identifier)

    def cancel(self, identifier: str) -> bool:
        """Stop a download, and return whether it had not ended. What has arrived is kept."""
        with self._lock:
            one = self._all.get(identifier)
            if one is None or one.state in (*ENDED, "adding"):
                return False
            self._cancelled.add(identifier)
        if one.state == "queued":
            self._change(replace(one, state="cancelled"))
        return True

    def stop(self) -> None:
        """Stop all downloads. They go on when the server starts again."""
        self._stopping = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, identifier: str) -> None:
        one = self.find(identifier)
        if one is None or one.state != "queued":
            return
        try:
            self._change(replace(one, state="running"))
            self._download(identifier)
        except Cancelled:
            # If the server stops, the download goes on when it starts again.
            if identifier in self._cancelled:
                self._update(identifier, state="cancelled", rate=0.0, seconds_left=None)
        except SafelightError as error:
            self._update(identifier, state="failed", problem=str(error), rate=0.0, seconds_left=None)
        except Exception as error:  # noqa: BLE001  (the pool would keep it to itself)
            _log.warning("a download failed in an unforeseen way", source=one.source, exc_info=True)
            self._update(identifier, state="failed", problem=f"{type(error).__name__}: {error}")

    def _download(self, identifier: str) -> None:
        one = self._all[identifier]
        last_event = 0.0

        def on_progress(now: DownloadProgress) -> None:
            nonlocal last_event
            if self._stopping or identifier in self._cancelled:
                raise Cancelled("the download was stopped")
            if time.monotonic() - last_event > SECONDS_BETWEEN_EVENTS:
                last_event = time.monotonic()
                self._update(identifier, done=now.done, total=now.total, rate=now.rate, seconds_left=now.seconds_left)

        parts = sources.read_parts(one.source, one.choice)
        with open_client(self._allowed) as client:
            wanted = Wanted.of([part.find(client) for part in parts], self._library, self._hashes)
            self._update(identifier, title=wanted.title, notes=wanted.notes, total=wanted.nbytes)
            paths = download_all(wanted.bundles, self._folder, client, on_progress)
        size = sum(path.stat().st_size for path in paths if path.is_file()) or self._all[identifier].done
        variant = one.variant or next((part.variant for part in parts if part.variant), "")
        self._update(identifier, state="adding", done=size, total=size, rate=0.0, seconds_left=None)
        if identifier in self._cancelled:
            raise Cancelled("the download was stopped")
        with self._adding:
            results = list(add(paths, self._library, one.name or None, variant))
        problems = [result.problem for result in results if result.problem]
        added = (*wanted.present, *(result.name for result in results if result.name))
        self._update(identifier, state="failed" if problems else "done", added=added, problem="; ".join(problems))

    def _update(self, identifier: str, **changes: Any) -> None:
        self._change(replace(self._all[identifier], **changes))

    def _change(self, changed: Download) -> None:
        """Store a download's new state, and report it. Progress alone is not written to the disk.

        Raises StorageError if a new download cannot be recorded.
        """
        with self._lock:
            before = self._all.get(changed.id)
            if before is None or before.state != changed.state:
                self._write_record(changed, is_new=before is None)
            self._all[changed.id] = changed
            self._forget_old()
        self._tell(changed)

    def _write_record(self, changed: Download, is_new: bool) -> None:
        path = self._records / f"{changed.id}.json"
        try:
            self._records.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(changed)).encode())
        except (OSError, UnreadableFileError) as error:
            if is_new:
                raise StorageError(path, f"cannot be written ({error})") from error
            _log.warning("cannot record the state of a download", state=changed.state, why=str(error))

    def _forget_old(self) -> None:
        ended = sorted((one for one in self._all.values() if one.state in ENDED), key=lambda one: one.created)
        for one in ended[:-MOST_KEPT]:
            del self._all[one.id]
            (self._records / f"{one.id}.json").unlink(missing_ok=True)

    def _read_records(self) -> dict[str, Download]:
        found: dict[str, Download] = {}
        for path in self._records.glob("*.json") if self._records.is_dir() else ():
            try:
                one = _RECORD.validate_json(path.read_bytes())
            except (OSError, ValueError) as error:
                _log.warning("a download's record cannot be read", file=str(path), why=str(error))
                continue
            found[one.id] = one
        return found
