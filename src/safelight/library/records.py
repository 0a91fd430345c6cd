"""A model's record on disk: JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.formats.folder import read_json
from safelight.library.model import Model
from safelight.weights.manifest import from_json, to_json


def write(path: Path, model: Model) -> None:
    """Write a record under a temporary name, then put it in its place."""
    values: dict[str, Any] = {field.name: getattr(model, field.name) for field in fields(model)}
    values["path"] = str(model.path)
    values["manifest"] = to_json(model.manifest)
    write_whole(path, json.dumps(values, indent=1).encode())


def read(path: Path, folder: Path | None = None) -> Model:
    """The record that :func:`write` wrote. Raises CorruptFileError when it is damaged.

    ``folder``: where the files of a manifest with relative paths are.
    """
    values = read_json(path)
    try:
        manifest = from_json(path, values["manifest"], folder)
        home = (folder or Path()) / values["path"]
        known: dict[str, Any] = {**values, "path": home, "manifest": manifest}
        return Model(**known)
    except (KeyError, TypeError) as error:
        raise CorruptFileError(path, f"is not a model's record ({error})") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename. Raises UnreadableFileError when it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be written: {error.strerror or error}") from error
