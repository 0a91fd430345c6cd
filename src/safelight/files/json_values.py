"""Values of JSON from files and servers that may contain anything."""

from __future__ import annotations

import json
from typing import Any, cast


def json_object(written: object) -> dict[str, Any]:
    """Return an object of JSON, parsed if it is a text or bytes. Returns an empty one for any other value."""
    try:
        found: Any = json.loads(written) if isinstance(written, str | bytes) else written
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def json_list(value: object) -> list[Any]:
    """Return a list. Returns an empty one for any other value."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def json_objects(value: object) -> list[dict[str, Any]]:
    """Return the objects of a list. Other values are left out."""
    return [row for row in json_list(value) if isinstance(row, dict)]
