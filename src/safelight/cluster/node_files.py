"""The files of a machine of the cluster: models and adapters by digest, from a shared folder or from the server.

Each tensor is verified when it is read, by the checksums of the record that came from the server. So a file that is
wrong here is an error, and never another image. No torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from safelight.catalog import records
from safelight.catalog.catalog import Catalog
from safelight.catalog.received import take_over
from safelight.cluster.needed import Needed, NeededFile, NeededRecord
from safelight.errors import FileError, IntegrityError, StorageError
from safelight.files.disk import write_whole
from safelight.logs import Log

_log = Log(__name__)

TRIES = 5
"""How often an interrupted transfer continues."""

CHUNK = 1 << 20

RESERVE = 64 << 20
"""Bytes that stay free on the disk."""


class NodeFiles:
    """The models, adapters and input images of one machine. The slots of a machine share them.

    ``root``: of the machine.
    ``client``: of the server's files; each request names the path on the server.
    ``budget``: the most bytes of the cache.
    ``shared``: whether a file that is here at the server's path may be used.
    """

    def __init__(self, root: Path, client: httpx.Client, budget: int, shared: bool) -> None:
        self.catalog = Catalog.under(root)
        self._root, self._cache = root, root / "cache"
        self._client, self._budget, self._shared = client, budget, shared
        self._distrusted: set[str] = set()
        root.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(root / ".cache.lock")

    def ensure(self, needed: Needed) -> None:
        """Bring everything that a job needs.

        Raises StorageError if there is no room, and FileError if a file cannot be fetched.
        """
        for digest, data in needed.inputs.items():
            if not self.catalog.inputs.stored_digest(digest):
                self.catalog.inputs.store("image", data)
        keep = {record.digest for record in needed.records}
        # Without need, no slot waits: another one may hold the lock for as long as it fetches files.
        if not all(self._is_here(record) for record in needed.records):
            # Another slot of this machine may need the same file. It waits, and then finds the file.
            with self._lock:
                for record in needed.records:
                    if not self._is_here(record):
                        self._bring(record, keep)
        for record in needed.records:
            self._touch(record)

    def distrust(self, needed: Needed) -> None:
        """Fetch what a job needs again when a job needs it next, because a file of it is damaged here."""
        with self._lock:
            for record in needed.records:
                shutil.rmtree(self._place(record), ignore_errors=True)
                self._distrusted.add(record.digest)

    def is_damaged(self, needed: Needed) -> bool:
        """Return whether the content of any record that a job needs is wrong here. Reads all of it."""
        library, adapters = self.catalog.library, self.catalog.adapters
        for record in needed.records:
            try:
                if record.kind == "model":
                    for card in library.cards():
                        if card.digest == record.digest:
                            library.verify(card.name)
                else:
                    adapters.verify(adapters.find_by_digest(str(record.values["name"]), record.digest))
            except (FileError, IntegrityError):
                return True
        return False

    def _is_here(self, record: NeededRecord) -> bool:
        """Return whether the machine has the content, with files that have not changed since."""
        if record.digest in self._distrusted:
            return False
        return any(card.digest == record.digest and card.state() == "there" for card in self._cards(record.kind))

    def _cards(self, kind: str) -> Any:
        return self.catalog.library.cards() if kind == "model" else self.catalog.adapters.cards()

    def _bring(self, record: NeededRecord, keep: set[str]) -> None:
        """Write the record of a model or adapter whose files are here, or are fetched now."""
        if any(card.digest == record.digest for card in self._cards(record.kind)):
            # It was here, and a file has changed since: nobody but this class writes into the cache.
            shutil.rmtree(self._place(record), ignore_errors=True)
        here: list[str] = []
        trusted = self._shared and record.digest not in self._distrusted
        for number, file in enumerate(record.files):
            shared = Path(file.path)
            # A shared folder has the same file at the same path.
            if trusted and file.size >= 0 and shared.is_file() and shared.stat().st_size == file.size:
                here.append(file.path)
                continue
            target = self._place(record) / f"{number}-{shared.name}"
            if file.size < 0:
                target.mkdir(parents=True, exist_ok=True)
            elif not target.is_file() or target.stat().st_size != file.size:
                self._make_room(file.size, keep)
                self._fetch(file, target)
            here.append(str(target))
        moved = dict(zip((file.path for file in record.files), here, strict=True))
        values = record.values
        values["manifest"] = {**values["manifest"], "files": [{"path": path} for path in here]}
        values["path"] = moved.get(values["path"], str(self._place(record)))
        self._write(record, values)
        self._distrusted.discard(record.digest)

    def _write(self, record: NeededRecord, values: dict[str, Any]) -> None:
        staged = self._root / "cache" / f"{record.digest}.json"
        write_whole(staged, records.encoded(values))
        try:
            if record.kind == "model":
                take_over(self.catalog, records.read(staged))
            else:
                take_over(self.catalog, records.read_adapter(staged))
        finally:
            staged.unlink(missing_ok=True)

    def _place(self, record: NeededRecord) -> Path:
        return self._cache / record.digest[:32]

    def _touch(self, record: NeededRecord) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._place(record))

    def _make_room(self, size: int, keep: set[str]) -> None:
        """Remove the copies that were used least recently until a file fits.

        Raises StorageError if it does not fit.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        kept = {digest[:32] for digest in keep}
        places = sorted((one for one in self._cache.iterdir() if one.is_dir()), key=lambda one: one.stat().st_mtime)
        used = {place: sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) for place in places}
        for place in places:
            if sum(used.values()) + size <= self._budget and self._fits(size):
                break
            if place.name not in kept:
                _log.info("a copy is removed from the cache", digest=place.name, bytes=used.pop(place))
                shutil.rmtree(place, ignore_errors=True)
        if sum(used.values()) + size > self._budget or not self._fits(size):
            raise StorageError(self._cache, f"has no room for {size / 1e9:.2f} GB (setting cluster_cache_gb)")

    def _fits(self, size: int) -> bool:
        return shutil.disk_usage(self._cache).free >= size + RESERVE

    def _fetch(self, file: NeededFile, target: Path) -> None:
        """Fetch a file in ranges; an interrupted transfer continues where it stopped."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        for attempt in range(TRIES):
            done = part.stat().st_size if part.exists() else 0
            if done == file.size:
                break
            try:
                self._fetch_from(file, part, done)
            except OSError as error:
                raise StorageError(part, f"cannot be written: {error.strerror or error}") from error
            except httpx.HTTPError as error:
                if attempt + 1 == TRIES:
                    problem = f"cannot be fetched from the server: {error or type(error).__name__}"
                    raise FileError(Path(file.path), problem) from error
                time.sleep(0.2 * 2**attempt)
        if not part.exists() or part.stat().st_size != file.size:
            part.unlink(missing_ok=True)
            raise FileError(Path(file.path), "the server sent another number of bytes than it has")
        part.replace(target)

    def _fetch_from(self, file: NeededFile, part: Path, done: int) -> None:
        headers = {"Range": f"bytes={done}-"}
        with self._client.stream("GET", "/file", params={"path": file.path}, headers=headers) as answer:
            answer.raise_for_status()
            if done and answer.status_code != 206:
                done = 0
            with part.open("ab" if done else "wb") as out:
                for chunk in answer.iter_bytes(CHUNK):
                    out.write(chunk)
