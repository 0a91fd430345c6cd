"""Stored requests: what pictures and the queue hold, of this version and of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from safelight.errors import RequestError
from safelight.request.field import fields_of
from safelight.request.schema import VERSION, Request


def read_request(stored: Any, version: int = VERSION) -> Request:
    """A request as it was stored by that version: a field that is missing has the default that it had then.

    Raises RequestError, naming the field, for one that this version does not know, that is missing though it has no
    default, or whose value is no longer allowed.
    """
    if version > VERSION:
        raise RequestError("version", version, f"was stored by a newer Safelight; this one reads up to {VERSION}")
    if not isinstance(stored, Mapping):
        raise RequestError("request", stored, "must be a JSON object")
    given, fields = cast("Mapping[str, Any]", stored), fields_of(Request)
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None:
        raise RequestError(unknown, given[unknown], "is a field that this version does not know")
    missing = next((name for name, field in fields.items() if field.required and name not in given), None)
    if missing is not None:
        raise RequestError(missing, None, "is missing")
    defaults = {name: field.default_in(version) for name, field in fields.items() if not field.required}
    return Request(**{**defaults, **given})
