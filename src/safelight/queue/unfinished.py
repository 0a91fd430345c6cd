"""Remembers on the disk which image files have no row in the database yet, for the next start of a killed server."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from safelight.files.disk import unwritable, write_whole


class UnfinishedImages:
    """The names of files by the identifiers of their images. Thread-safe.

    ``path``: of a file with a line of JSON for each image that begins or is finished. It is emptied whenever all are
    finished. Creating and deleting a file for each image takes a file system longer: ext4 gives no new file the number
    of one that was deleted within the last seconds, and searches for another.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def add(self, names: Mapping[str, str]) -> None:
        """Remember images. Raises UnreadableFileError if the file cannot be written."""
        with self._lock:
            try:
                self._append(names)
            except OSError as error:
                raise unwritable(self._path, error) from error
            self._open.update(names)

    def finish(self, image_id: str) -> None:
        """Forget an image: its row is there, or its files are gone. Another file may get the name from now on."""
        with self._lock:
            if image_id not in self._open:
                return
            self._open.remove(image_id)
            with contextlib.suppress(OSError):
                if self._open:
                    self._append({image_id: None})
                else:
                    os.truncate(self._path, 0)

    def read(self) -> dict[str, str]:
        """Return the images that an earlier process has not finished."""
        found: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                # A line may have been cut, or be of somebody else.
                with contextlib.suppress(ValueError, TypeError):
                    image_id, name = json.loads(line)
                    if name is None:
                        found.pop(image_id, None)
                    else:
                        found[image_id] = name
        return found

    def keep(self, names: Mapping[str, str]) -> None:
        """Remember only these images. Raises UnreadableFileError if the file cannot be written."""
        with self._lock:
            self._open = set(names)
            if names:
                write_whole(self._path, _lines(names).encode())
            else:
                # A full disk has room for this.
                with contextlib.suppress(OSError):
                    os.truncate(self._path, 0)

    def _append(self, names: Mapping[str, str | None]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(names))


def _lines(names: Mapping[str, str | None]) -> str:
    """Return the lines of images; None as the name of one that is finished."""
    # A line before these that was cut, because the disk was full, ends at the first sign.
    return "".join(f"\n{json.dumps(one)}" for one in names.items()) + "\n"
