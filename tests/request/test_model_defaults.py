"""A model's defaults: which values they may have, and which requests get them."""

from __future__ import annotations

from typing import Any

import pytest

import safelight
from safelight.errors import RequestError
from safelight.request.field import fields_of
from safelight.request.model_defaults import FIELDS, check_defaults, fill_in, read_defaults

OWN: dict[str, Any] = {"steps": 8, "cfg": 1.0, "sampler": "dpmpp_2m", "schedule": "karras", "clip_skip": 1}


def ask(**given: Any) -> safelight.Request:
    return safelight.Request("an apple", "m", **given)


def test_a_request_that_names_nothing_gets_all_of_them() -> None:
    assert fill_in(ask(), OWN) == OWN


@pytest.mark.parametrize("name", FIELDS)
def test_a_request_says_otherwise(name: str) -> None:
    """Also with a value that is the family's default, or zero."""
    field = fields_of(safelight.Request)[name]
    assert field.default in (None, ""), "otherwise a request could not say that it names none"
    values = {"width": 64, "height": 64, "steps": 20, "sampler": "euler", "schedule": "default", "clip_skip": 0}
    given = {name: values.get(name, "x" if field.type is str else 1.0)}
    assert name not in fill_in(ask(**given), OWN | {name: given[name]})


def test_a_default_schedule_belongs_to_the_default_sampler() -> None:
    assert fill_in(ask(sampler="euler"), OWN).keys() == {"steps", "cfg", "clip_skip"}
    assert fill_in(ask(schedule="exponential"), OWN)["sampler"] == "dpmpp_2m"


def test_what_a_user_writes() -> None:
    found = read_defaults({"steps": "30", "sampler": "DPM++ 2M Karras", "cfg": "5.5", "vae": "ae", "width": "768"})
    assert found == {
        "width": 768,
        "steps": 30,
        "cfg": 5.5,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "vae": "ae",
    }


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"seed": "3"}, "a model has defaults for width, height"),
        ({"steps": "many"}, "must be a whole number"),
        ({"steps": "0"}, "steps"),
        ({"cfg": "x"}, "must be a number"),
        ({"sampler": "slow"}, "must be one of"),
        ({"width": "100"}, "multiple of 8"),
        ({"clip_skip": "99"}, "clip_skip"),
    ],
)
def test_what_cannot_be_a_default_is_refused_by_name(texts: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_defaults(texts)


def test_nothing_is_no_default() -> None:
    with pytest.raises(RequestError, match="leave it out"):
        check_defaults({"steps": None})
