"""What was measured of this machine, once for its versions, in a JSON file of the root. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from safelight.errors import FileError
from safelight.files import write_whole
from safelight.formats.folder import read_json

_log = structlog.get_logger(__name__)


def read(path: Path, key: str) -> Mapping[str, Any]:
    """What was kept under ``key``; nothing when nothing was, or the file is damaged: then it is measured again."""
    return everything(path).get(key, {})


def keep(path: Path, key: str, values: Mapping[str, Any]) -> None:
    """Keep ``values`` under ``key`` beside what is there. When it cannot be written the log says so."""
    try:
        write_whole(path, json.dumps({**everything(path), key: values}, indent=1, sort_keys=True).encode())
    except FileError as error:
        _log.warning("what was seen of this machine cannot be kept", path=str(path), why=str(error))


def everything(path: Path) -> dict[str, Mapping[str, Any]]:
    """All that was kept, by key; what is damaged is left out."""
    if not path.exists():
        return {}
    try:
        values = read_json(path)
    except FileError:
        return {}
    return {key: value for key, value in values.items() if isinstance(value, Mapping)}
