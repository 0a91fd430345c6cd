"""Quarantine: models whose files no longer have the content that was added. They are not used.

``ROOT/quarantine/NAME.json`` says why, and which sizes and times the files had then.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safelight import names
from safelight.catalog import records
from safelight.catalog.model import Model
from safelight.errors import FileError, IntegrityError
from safelight.files.disk import write_whole
from safelight.files.folder import read_json
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import FileStamp


class Quarantine:
    """The quarantine of the library under ``root``."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "quarantine"

    def reason(self, model: Model) -> str | None:
        """Return why a model is in quarantine; None if it is not, or if its files changed since."""
        path = self._path(model)
        try:
            values = read_json(path) if path.exists() else {}
        except FileError:
            return None
        if (values.get("digest"), values.get("files")) != (model.digest, _files(model)):
            return None
        return str(values.get("reason"))

    def refuse(self, model: Model) -> None:
        """Raise IntegrityError if a model is in quarantine."""
        reason = self.reason(model)
        if reason is not None:
            remedy = f"Put the right file back and run `safelight models verify {model.name}` to end the quarantine."
            raise IntegrityError(model.path, "", f"is in quarantine: {reason}", remedy)

    def put(self, model: Model, reason: str) -> None:
        """Put a model into quarantine, if its files exist."""
        files = _files(model)
        if all(file["there"] for file in files):
            values = {"digest": model.digest, "files": files, "reason": reason, "since": time.time()}
            write_whole(self._path(model), records.encoded(values))

    def end(self, model: Model) -> None:
        """End the quarantine of a model; do nothing if it is in none."""
        self._path(model).unlink(missing_ok=True)

    def rename(self, model: Model, renamed: Model) -> None:
        """Move the entry of a model to its new name."""
        path = self._path(model)
        if path.exists():
            path.rename(self._path(renamed))

    def _path(self, model: Model) -> Path:
        name = hash_texts(str(model.path)) if model.origin == "path" else names.file_stem(model.name)
        return self._folder / f"{name}.json"


def _files(model: Model) -> list[dict[str, Any]]:
    """Return the present sizes and times of a model's files."""
    found: list[dict[str, Any]] = []
    for stamp in model.manifest.files:
        there = stamp.path.is_file()
        look = asdict(FileStamp.of(stamp.path)) if there else {}
        found.append({**look, "path": str(stamp.path), "there": there})
    return found
