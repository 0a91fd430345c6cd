"""Reads and writes records of models and adapters: JSON files with their own checksum, written atomically."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safelight.catalog.model import Adapter, Model
from safelight.errors import CorruptFileError
from safelight.files.disk import write_whole
from safelight.files.folder import read_json
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import from_json, to_json

Record = TypeVar("Record", Model, Adapter)

_USER_SET = {Model: "prediction_type_from_user", Adapter: "base_from_user"}
"""The field of each class that records store under the name :data:`_STORED_USER_SET`."""

_STORED_USER_SET = "told"


def write(path: Path, model: Model | Adapter) -> None:
    """Write a record. Raises UnreadableFileError when it cannot be written."""
    write_whole(path, encoded(stored_values(model)))


def stored_values(model: Model | Adapter) -> dict[str, Any]:
    """Return the values that a record stores, as JSON values by their stored names."""
    stored_names = {_USER_SET[type(model)]: _STORED_USER_SET}
    values: dict[str, Any] = {stored_names.get(f.name, f.name): getattr(model, f.name) for f in fields(model)}
    return values | {"path": str(model.path), "manifest": to_json(model.manifest)}


def encoded(values: dict[str, Any]) -> bytes:
    """Encode a record's values as JSON, one on each line. Their checksum comes first."""
    every = {"checksum": _checksum(values), **values}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in every.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _checksum(values: dict[str, Any]) -> str:
    return hash_texts(json.dumps(values, sort_keys=True))


def read(path: Path, folder: Path | None = None) -> Model:
    """Read a model's record.

    ``folder``: base folder of relative paths in the manifest.
    Raises CorruptFileError when the record is damaged.
    """
    return _read(path, Model, folder)


def read_adapter(path: Path, folder: Path | None = None) -> Adapter:
    """Read an adapter's record, as :func:`read` does."""
    return _read(path, Adapter, folder)


def _read(path: Path, kind: type[Record], folder: Path | None) -> Record:
    values = read_json(path)
    if values.pop("checksum", None) != _checksum(values):
        raise CorruptFileError(path, "is damaged or was edited: its checksum does not match its content")
    try:
        manifest = from_json(path, values["manifest"], folder)
        model_path = (folder or Path()) / values["path"]
        known: dict[str, Any] = {**values, "path": model_path, "manifest": manifest}
        if _STORED_USER_SET in known:
            known[_USER_SET[kind]] = known.pop(_STORED_USER_SET)
        if "trigger_words" in known:
            known["trigger_words"] = tuple(known["trigger_words"])
        return kind(**known)
    except (KeyError, TypeError) as error:
        raise CorruptFileError(path, f"is not a {kind.__name__.lower()}'s record ({error})") from error
