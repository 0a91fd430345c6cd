"""Grids: axes, cells, and the order with the fewest switches."""

from __future__ import annotations

from itertools import pairwise

import pytest

from safelight.errors import RequestError
from safelight.request.adapters import Lora
from safelight.request.grid import Axis, axis, cells
from safelight.request.schema import Request

ASKED = Request("red apple", "a", loras=(Lora("base", 0.5),))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=1..4", ("1", "2", "3", "4")),
        ("cfg=0..1/0.25", ("0", "0.25", "0.5", "0.75", "1")),
        ("steps=10,20", ("10", "20")),
        ("seed=1234567..1234569", ("1234567", "1234568", "1234569")),
        ("seed=3,7..8", ("3", "7", "8")),
        ("lora=none,ink:0.5,a+b:2", ("none", "ink:0.5", "a+b:2")),
    ],
)
def test_axes(text: str, values: tuple[str, ...]) -> None:
    assert axis("x", text) == Axis(text.partition("=")[0], values)


@pytest.mark.parametrize(
    "text",
    [
        "seed",
        "colour=red",
        "seed=",
        "seed=1,,2",
        "seed=1..2/0",
        f"seed=0..{'9' * 400}",
        "seed=5..1",
        "seed=1..0",
        "cfg=0..9999",
    ],
)
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(RequestError, match="x="):
        axis("x", text)


def test_every_kind_of_value() -> None:
    def one(text: str) -> Request:
        return cells(ASKED, axis("x", text), None)[-1].request

    assert one("model=a,b").model == "b"
    assert one("lora=none,ink:0.5+b").loras == (Lora("base", 0.5), Lora("ink", 0.5), Lora("b"))
    assert one("lora-strength=0,1").loras == (Lora("base", 1.0),)
    assert one("sampler=Euler-A").sampler == "euler_a"
    assert (one("steps=5").steps, one("cfg=3.5").cfg, one("seed=9").seed) == (5, 3.5, 9)
    assert one("prompt=red,green").prompt == "green apple"
    assert one("clip-skip=1").clip_skip == 1
    assert one("shift=3").shift == 3.0
    assert one("guidance=2.5").guidance == 2.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps=many", "must be a number"),
        ("sampler=euler_x", "must be one of"),
        ("prompt=pear,fig", "must be a part of the prompt"),
        ("lora=a:b", "is not a number"),
        ("steps=0", "steps"),
    ],
)
def test_values_that_are_not_allowed(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        cells(ASKED, axis("x", text), None)
    with pytest.raises(RequestError, match="varies along x already"):
        cells(ASKED, axis("x", "seed=1"), axis("y", "seed=2"))


def test_switches_are_as_few_as_combinations() -> None:
    """Whichever axis has the models: one run for each model, and in it one for each adapter."""
    for x, y in (("model=a,b,c", "seed=0..3"), ("seed=0..3", "model=a,b,c"), ("model=a,b,c", "lora=none,i:0.5,i:1")):
        found = cells(ASKED, axis("x", x), axis("y", y))
        models = [cell.request.model for cell in found]
        assert sum(one != other for one, other in pairwise(models)) == 2
        combinations = [(cell.request.model, cell.request.loras) for cell in found]
        changes = sum(one != other for one, other in pairwise(combinations))
        assert changes == len(set(combinations)) - 1
        assert {(cell.column, cell.row) for cell in found} == {
            (column, row) for column in range(len(axis("x", x).values)) for row in range(len(axis("y", y).values))
        }


def test_strengths_are_those_of_all_adapters_whichever_axis_names_them() -> None:
    asked = Request("red apple", "a")
    for x, y in (("lora=none,ink", "lora-strength=0.5,1"), ("lora-strength=0.5,1", "lora=none,ink")):
        made = {cell.request.loras for cell in cells(asked, axis("x", x), axis("y", y))}
        assert made == {(), (Lora("ink", 0.5),), (Lora("ink", 1.0),)}
    with pytest.raises(RequestError, match="needs an adapter: give --lora"):
        cells(asked, axis("x", "lora-strength=1"), None)
    with pytest.raises(RequestError, match="without --image"):
        cells(asked, axis("x", "strength=0.5,1"), None)
    with pytest.raises(RequestError, match="block weights contain commas"):
        axis("x", "lora=ink:lbw=1,0")
