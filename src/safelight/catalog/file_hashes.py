"""The hashes of whole files by which other programs and servers name a model.

Safelight's own digests are those of tensors, so that they do not depend on the file. These are kept beside them, in
``ROOT/file_hashes.json``: for each file with its size and time.

- SHA-256. Civitai and Hugging Face have it. Its first ten digits are A1111's hash of a checkpoint (AutoV2).
- AutoV3: SHA-256 of a safetensors file without its header. Its first twelve digits are A1111's hash of a LoRA.
- AutoV1: A1111's old hash, of 64 KiB at 1 MiB; eight digits.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safelight.catalog.cards import Card
from safelight.catalog.index_file import Stamp, stamp_of
from safelight.catalog.lock import library_lock
from safelight.errors import FileError, UnreadableFileError
from safelight.files.disk import open_regular, read_file, write_whole
from safelight.files.json_values import json_object
from safelight.logs import Log

_log = Log(__name__)

FILE = "file_hashes.json"

CHUNK = 8 << 20

FEWEST_DIGITS = 8
"""Fewer digits of a hash name no file."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """The hashes of a file, in hex. ``autov3``: "" for a file that is not safetensors."""

    size: int
    mtime_ns: int
    sha256: str
    autov1: str
    autov3: str = ""

    def match(self, digits: str) -> bool:
        """Return whether another program's hash is one of these. ``digits``: its first ones, at least eight."""
        wanted = digits.strip().lower().removeprefix("0x")
        if len(wanted) < FEWEST_DIGITS:
            return False
        return self.autov1 == wanted or any(one.startswith(wanted) for one in (self.sha256, self.autov3) if one)


class FileHashes:
    """The hashes of files, in a library's folder. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._last: tuple[Stamp | None, dict[str, Any]] = (None, {})

    def known(self, path: Path) -> Hashes | None:
        """Return the hashes of a file that were computed before, if it is unchanged; else None. Nothing is read."""
        return _current(path, self._read().get(str(path)))

    def of(self, path: Path) -> Hashes | None:
        """Return the hashes of a file, computed if they are not known. None for a folder, or a file that is gone."""
        known = self.known(path)
        if known is not None or not path.is_file():
            return known
        with self._lock:
            found = self.known(path)
            if found is None:
                try:
                    found = _compute(path)
                except FileError:
                    return None
                self._store(path, found)
            return found

    def find(self, digits: str, cards: Iterable[Card]) -> Card | None:
        """Return the card whose file has a hash that begins so, of those whose hashes are known; None if none has."""
        table = self._read()
        for card in cards:
            path = str(card.path)
            found = _current(card.path, table[path]) if path in table else None
            if found is not None and found.match(digits):
                return card
        return None

    def _read(self) -> Mapping[str, Any]:
        """Return the table. The file is read again only if it has changed."""
        stamp, last = stamp_of(self._root / FILE), self._last
        if stamp is None:
            return {}
        if stamp != last[0]:
            try:
                last = (stamp, json_object(read_file(self._root / FILE)))
            except FileError:
                return {}
            self._last = last
        return last[1]

    def _store(self, path: Path, found: Hashes) -> None:
        """Store hashes. That they cannot be stored is no error: they are computed again."""
        try:
            with library_lock(self._root):
                table = {**self._read(), str(path): asdict(found)}
                write_whole(self._root / FILE, json.dumps(table, indent=0).encode())
        except (OSError, FileError) as error:
            _log.warning("cannot store the hashes of a file", file=str(path), why=str(error))


def _current(path: Path, stored: Any) -> Hashes | None:
    """Return stored hashes if the file has the same size and time now."""
    try:
        found = Hashes(**json_object(stored))
        status = os.stat(path)
    except (TypeError, OSError):
        return None
    return found if (status.st_size, status.st_mtime_ns) == (found.size, found.mtime_ns) else None


def _compute(path: Path) -> Hashes:
    """Read all of a file. Raises UnreadableFileError."""
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        try:
            before = os.fstat(file.fileno()).st_mtime_ns
            whole, data, at = hashlib.sha256(), hashlib.sha256(), 0
            header = _header_bytes(file.read(8), size) if path.suffix == ".safetensors" else None
            file.seek(0)
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                if header is not None:
                    data.update(chunk[max(0, header - at) :])
                at += len(chunk)
            file.seek(0x100000)
            old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        except OSError as error:
            raise UnreadableFileError(path, f"cannot be read ({error.strerror})") from error
    return Hashes(size, before, whole.hexdigest(), old, data.hexdigest() if header is not None else "")


def _header_bytes(start: bytes, size: int) -> int | None:
    """Return how many bytes are before the tensors of a safetensors file; None if it is none."""
    length = int.from_bytes(start, "little")
    return 8 + length if len(start) == 8 and 8 + length <= size else None
