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

    ``path``: of a file that has a line of JSON for each image, and is emptied whenever all are finished. Creating and
    deleting a file for each image takes a file system longer: ext4 gives no new file the number of one that was deleted
    within the last seconds, and searches for another.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def add(self, names: Mapping[str, str]) -> None:
        """Remember images. Raises UnreadableFileError if the file cannot be written."""
        # A line that was cut, because the disk was full, ends here at the latest.
        text = "".join(f"\n{json.dumps(one)}" for one in names.items()) + "\n"
        with self._lock:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                raise unwritable(self._path, error) from error
            self._open.update(names)

    def finish(self, image_id: str) -> None:
        """Forget an image: its row is there, or its files are gone."""
        with self._lock:
            self._open.discard(image_id)
            if not self._open:
                # What stays in the file does no harm: the rows of those images are there, or their files are gone.
                with contextlib.suppress(OSError):
                    os.truncate(self._path, 0)

    def read(self) -> dict[str, str]:
        """Return what an earlier process left in the file."""
        found: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                # A line may have been cut.
                with contextlib.suppress(ValueError):
                    image_id, name = json.loads(line)
                    found[str(image_id)] = str(name)
        return found

    def keep(self, names: Mapping[str, str]) -> None:
        """Remember only these images. Raises UnreadableFileError if the file cannot be written."""
        with self._lock:
            self._open.clear()
            if self._path.exists():
                write_whole(self._path, b"")
        if names:
            self.add(names)
