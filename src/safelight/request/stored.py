"""Reads requests that this version or an earlier one stored in images and in the queue."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from safelight.errors import RequestError
from safelight.request.field import fields_of
from safelight.request.schema import VERSION, Request


def read_request(stored: Any, version: int = VERSION) -> Request:
    """Read a request that the given version stored. A missing field has the default of that version.

    Raises RequestError, naming the field, if a field is unknown to this version, is required but missing, or has a
    value that is no longer allowed.
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
    return Request(**{**_defaults(version), **given})


@cache
def _defaults(version: int) -> Mapping[str, Any]:
    return {name: field.default_in(version) for name, field in fields_of(Request).items() if not field.required}
