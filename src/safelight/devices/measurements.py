"""A JSON file of values by key, such as measurements of this machine. Losing it only costs time. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import FileError
from safelight.files.disk import write_whole
from safelight.files.folder import read_json
from safelight.logs import Log

_log = Log(__name__)


def read(path: Path, key: str) -> Mapping[str, Any]:
    """Return the values stored under ``key``. Empty if there are none, or the file is damaged. Then measure again."""
    return everything(path).get(key, {})


def keep(path: Path, key: str, values: Mapping[str, Any]) -> None:
    """Store ``values`` under ``key`` and leave other keys as they are. If writing fails, log a warning."""
    try:
        write_whole(path, json.dumps({**everything(path), key: values}, indent=1, sort_keys=True).encode())
    except FileError as error:
        _log.warning("cannot store the measurements of this machine", path=str(path), why=str(error))


def everything(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return all stored values by key, without damaged entries."""
    if not path.exists():
        return {}
    try:
        values = read_json(path)
    except FileError:
        return {}
    return {key: value for key, value in values.items() if isinstance(value, Mapping)}
