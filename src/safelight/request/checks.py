"""Checks of a request's values; each raises RequestError, naming the field."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from safelight.errors import RequestError


def check_name(field_name: str, name: object) -> None:
    if not isinstance(name, str) or not name or "\0" in name or not _encodes(name):
        raise RequestError(field_name, name, "must be a name or a path")


def text(field_name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(field_name, text, "must be text")
    if "\0" in text:
        raise RequestError(field_name, text, "must be text without NUL characters")
    if not _encodes(text):
        raise RequestError(field_name, text, "must be text that UTF-8 can encode")


def number(field_name: str, value: object, low: float, high: float, what: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field_name, value, f"{what} must be a number from {low:g} to {high:g}".strip())


def above(field_name: str, value: object, low: float, high: float, what: str = "") -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value <= high:
        raise RequestError(field_name, value, f"{what} must be above {low:g}, and at most {high:g}".strip())


def boolean(field_name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(field_name, value, "must be true or false")


def _encodes(text: str) -> bool:
    """False for half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_of(field_name: str, value: object, allowed: Collection[str], what: str = "") -> None:
    """``what``: names the part of the field that is checked, for the error; "" for the whole field."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(one for one in allowed if one)
        empty = "empty, or " if "" in allowed else ""
        raise RequestError(field_name, value, f"{what} must be {empty}one of {listed}{hint}".strip())


def within(field_name: str, value: object, low: int, high: int, multiple: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field_name, value, f"must be a whole number from {low} to {high}")
    if value % multiple:
        near = max(multiple, round(value / multiple) * multiple)
        raise RequestError(field_name, value, f"must be a multiple of {multiple}; the nearest is {near}")
