"""Downloads the files of a bundle, several at once, into its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
from filelock import FileLock, Timeout

from safelight.downloads.fetch import SPARE_BYTES, fetch, is_right
from safelight.downloads.remote import Bundle, RemoteFile, checked_name
from safelight.errors import Cancelled, DownloadError, StorageError
from safelight.files.disk import write_whole
from safelight.files.folder import INDICES

AT_ONCE = 3

WINDOW_SECONDS = 10.0
"""The rate is that of the last seconds."""

LOCK = ".download.lock"

SOURCES = ".downloaded.json"
"""The file with what the sources said of each file in the folder."""


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a bundle is.

    ``done``, ``total``: bytes; the total is None while the size of a file is unknown.
    ``rate``: bytes per second.
    ``seconds_left``: None if it is unknown.
    """

    done: int
    total: int | None
    rate: float
    seconds_left: float | None


OnProgress = Callable[[DownloadProgress], None]
"""Called from the threads that download, one at a time. It may raise to stop."""


class _Tally:
    """Adds up the bytes of all files of a bundle."""

    def __init__(self, bundle: Bundle, on_progress: OnProgress) -> None:
        self._done: dict[str, int] = {}
        self._total: dict[str, int | None] = {one.name: one.nbytes for one in bundle.files if not one.optional}
        self._recent: deque[tuple[float, int]] = deque()
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.stopped = False

    def update(self, file: RemoteFile, done: int, total: int | None) -> None:
        """Count the bytes of a file. Raises Cancelled in all threads after one has failed."""
        if self.stopped:
            raise Cancelled("another file of the same download failed")
        with self._lock:
            if not file.optional:
                self._done[file.name], self._total[file.name] = done, total
            now, whole = time.monotonic(), sum(self._done.values())
            self._recent.append((now, whole))
            while now - self._recent[0][0] > WINDOW_SECONDS:
                self._recent.popleft()
            since, before = self._recent[0]
            rate = max(0.0, (whole - before) / (now - since)) if now > since else 0.0
            sizes = list(self._total.values())
            total = None if None in sizes else sum(size for size in sizes if size is not None)
            left = (total - whole) / rate if total is not None and rate else None
            self._on_progress(DownloadProgress(whole, total, rate, left))


def download(bundle: Bundle, folder: Path, client: httpx.Client, on_progress: OnProgress) -> list[Path]:
    """Download a bundle. Return what can be added: files with weights, or the folder if it is one of diffusers.

    ``folder``: of all downloads. A file that is there and right is not downloaded again; a part is continued.
    Raises DownloadError, StorageError, and what ``on_progress`` raises. What has arrived is kept.
    """
    home = _home(bundle, folder)
    _check_room(bundle, home)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(home, f"cannot be written: {error.strerror}") from error
    tally = _Tally(bundle, on_progress)
    try:
        with FileLock(home / LOCK, timeout=0):
            _download_all(bundle, home, client, tally)
    except Timeout as error:
        raise DownloadError(bundle.title, f"is being downloaded by another program into {home}") from error
    said = {**_sources(home), **{one.name: _content(one) for one in bundle.files}}
    write_whole(home / SOURCES, json.dumps(said, indent=1).encode())
    for name, text in bundle.texts.items():
        write_whole(home / name, text.encode(errors="replace"))
    if any(one.name in INDICES for one in bundle.files):
        return [home]
    return [home / one.name for one in bundle.files if not one.optional]


def download_all(bundles: Sequence[Bundle], folder: Path, client: httpx.Client, on_progress: OnProgress) -> list[Path]:
    """Download bundles, one after the other; see :func:`download`. The progress is that of all of them."""
    paths: list[Path] = []
    sizes = [bundle.nbytes for bundle in bundles]
    for number, bundle in enumerate(bundles):
        before = sum(size or 0 for size in sizes[:number])
        after = None if None in sizes[number + 1 :] else sum(size or 0 for size in sizes[number + 1 :])

        def report(now: DownloadProgress, before: int = before, after: int | None = after) -> None:
            total = None if now.total is None or after is None else before + now.total + after
            left = (total - before - now.done) / now.rate if total is not None and now.rate else None
            on_progress(DownloadProgress(before + now.done, total, now.rate, left))

        paths += download(bundle, folder, client, report)
    return paths


def _home(bundle: Bundle, folder: Path) -> Path:
    """Return the folder for a bundle, which is always within ``folder``.

    If its usual folder has files of other content, a model may use them. Then the bundle gets a new folder. A damaged
    file of the same content is replaced.
    """
    home = folder / checked_name(bundle.title, bundle.folder)
    once = _sources(home)
    known = [one for one in bundle.files if not one.optional and (one.sha256 or one.nbytes is not None)]
    others = [one for one in known if (home / one.name).exists() and once.get(one.name) != _content(one)]
    if all(is_right(home / one.name, one) for one in others):
        return home
    content = "\n".join(f"{one.name} {one.nbytes} {one.sha256}" for one in bundle.files)
    return home.with_name(f"{home.name}@{hashlib.sha256(content.encode()).hexdigest()[:10]}")


def _sources(home: Path) -> dict[str, Any]:
    """Return what the sources said of each file; empty for a folder of an earlier version."""
    with contextlib.suppress(OSError, ValueError):
        found: Any = json.loads((home / SOURCES).read_text())
        if isinstance(found, dict):
            return cast("dict[str, Any]", found)
    return {}


def _content(file: RemoteFile) -> dict[str, Any]:
    return {"nbytes": file.nbytes, "sha256": file.sha256}


def _check_room(bundle: Bundle, home: Path) -> None:
    """Raise StorageError if the disk has no room for what is missing."""
    missing = sum(one.nbytes for one in bundle.files if one.nbytes is not None and not (home / one.name).exists())
    place = next(parent for parent in (home, *home.parents) if parent.exists())
    parts = sum(one.stat().st_size for one in home.rglob("*.part")) if home.exists() else 0
    free, needed = shutil.disk_usage(place).free, missing - parts + SPARE_BYTES
    if free < needed:
        problem = f"the disk has {free / 1e9:.1f} GB free, and {bundle.title} needs {needed / 1e9:.1f} GB"
        raise StorageError(home, problem)


def _download_all(bundle: Bundle, home: Path, client: httpx.Client, tally: _Tally) -> None:
    def one(file: RemoteFile) -> None:
        def on_bytes(done: int, total: int | None) -> None:
            tally.update(file, done, total)

        try:
            fetch(client, file, home / file.name, on_bytes)
        except DownloadError:
            if not file.optional:
                raise

    with ThreadPoolExecutor(AT_ONCE, "safelight-download") as pool:
        futures = [pool.submit(one, file) for file in bundle.files]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in done if future.exception() is not None), None)
        except BaseException:
            tally.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failed is not None:
            # The other threads stop at their next bytes.
            tally.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            failed.result()
