"""A model's defaults: what a request gets for fields that it does not name. Users and other programs set them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from safelight.errors import RequestError
from safelight.request.field import fields_of
from safelight.request.samplers import parse_sampler_and_schedule
from safelight.request.schema import Request

ModelDefaults: TypeAlias = Mapping[str, Any]
"""Values of a request's fields, by the name of the field; each name is one of :data:`FIELDS`."""

FIELDS = ("width", "height", "steps", "cfg", "guidance", "shift", "sampler", "schedule", "clip_skip", "vae")
"""The fields that a model may have defaults for."""


OWN_VAE = "own"
"""The value of a request's ``vae`` that means the model's own, whatever the model's defaults name."""


def check_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in the order of :data:`FIELDS`.

    Raises RequestError for a field that no model has defaults for, or a value that no request may have.
    """
    declared = fields_of(Request)
    for name, value in values.items():
        if name not in FIELDS:
            raise RequestError(name, value, f"a model has defaults for {', '.join(FIELDS)}")
        if value is None or value == "":
            raise RequestError(name, value, "is no default; leave it out")
        declared[name].check(value)
    return {name: values[name] for name in FIELDS if name in values}


def read_defaults(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the defaults that a user wrote as texts, checked. Raises RequestError.

    Samplers and schedules may have AUTOMATIC1111's names, also both in one: ``DPM++ 2M Karras``.
    """
    declared, values = fields_of(Request), dict[str, Any]()
    for name, text in texts.items():
        kind = declared[name].type if name in FIELDS else str
        try:
            values[name] = kind(text) if kind in (int, float) else text
        except ValueError as error:
            raise RequestError(name, text, "must be a whole number" if kind is int else "must be a number") from error
    found = parse_sampler_and_schedule(values.get("sampler"), values.get("schedule"))
    sampling = {name: value for name, value in zip(("sampler", "schedule"), found, strict=True) if value is not None}
    return check_defaults(values | sampling)


def fill_in(request: Request, own: ModelDefaults) -> dict[str, Any]:
    """Return the model's defaults for those fields that a request does not name.

    A default schedule belongs to the default sampler: a request that names another sampler does not get it.
    """
    found = {name: value for name, value in own.items() if getattr(request, name) in (None, "")}
    if request.sampler is not None:
        found.pop("schedule", None)
    return found
