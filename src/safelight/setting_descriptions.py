"""What a setting allows, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr

from safelight.settings import Settings, details_of


def choices_of(name: str) -> tuple[str, ...]:
    """Return the allowed values of a setting that has only a few; () for all others."""
    kind = Settings.model_fields[name].annotation
    if kind is bool:
        return ("true", "false")
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def describe_allowed(name: str) -> str:
    """Return the allowed values of a setting in words, such as "a whole number from 1 to 1024"."""
    declared, details = Settings.model_fields[name], details_of(name)
    kind = declared.annotation
    if get_origin(kind) in (Union, UnionType):
        [kind] = [one for one in get_args(kind) if one is not NoneType]
    if details.allowed:
        return details.allowed
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    bounds = {bound: getattr(one, bound) for one in declared.metadata for bound in _BOUNDS if hasattr(one, bound)}
    limits = " ".join(_BOUNDS[bound].format(value) for bound, value in bounds.items())
    if {"ge", "le"} <= bounds.keys():
        limits = f"from {bounds['ge']} to {bounds['le']}"
    unit = f"({details.unit})" if details.unit and kind in (int, float) else ""
    return " ".join(filter(None, (_KINDS[kind], limits, unit)))


_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    SecretStr: "text",
    Path: "a path",
    tuple[Path, ...]: "a list of paths",
    tuple[str, ...]: "a list of words",
}
_BOUNDS: Mapping[str, str] = {
    "gt": "above {}",
    "ge": "of at least {}",
    "le": "of at most {}",
    "min_length": "of at least {} characters",
}
