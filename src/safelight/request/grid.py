"""Grids: one request varied along one or two axes, its cells in the order with the fewest switches of models.

No torch, no I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from safelight.errors import RequestError
from safelight.request.adapters import Lora
from safelight.request.prompts.loras import lora_to_tag, parse_lora
from safelight.request.samplers import SAMPLERS, sampler_by_name
from safelight.request.schema import Request

MOST_CELLS = 400
NONE = "none"

_RANGE = re.compile(r"(-?[0-9.]+)\.\.(-?[0-9.]+)(?:/([0-9.]+))?")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a grid.

    ``name``: the field that varies, a key of :data:`AXES`.
    ``values``: the values as the user wrote them; they label the rows or columns.
    """

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One request of a grid and its position; ``column`` and ``row`` count from 0."""

    column: int
    row: int
    request: Request


def axis(option: str, text: str) -> Axis:
    """Read an axis from ``NAME=V1,V2,…``; a value such as ``1..4`` or ``0..1/0.25`` is a range.

    ``option``: the name of the option, for errors.
    Raises RequestError when the name is unknown, or a value is missing or not a range.
    """
    name, equals, rest = text.partition("=")
    if not equals or name not in AXES:
        raise RequestError(option, text, f"must be one of {', '.join(f'{known}=…' for known in AXES)}")
    if name == "lora" and "lbw=" in rest:
        raise RequestError(
            option, text, "block weights contain commas, which separate the values here; give them with --lora"
        )
    values: list[str] = []
    for value in (part.strip() for part in rest.split(",")):
        values += _spread(option, value)
    if not values or "" in values:
        raise RequestError(option, text, "needs values, separated by commas")
    return Axis(name, tuple(values))


def _spread(option: str, value: str) -> list[str]:
    found = _RANGE.fullmatch(value)
    if found is None:
        return [value]
    try:
        low, high, step = float(found[1]), float(found[2]), float(found[3] or 1)
        count = math.floor((high - low) / step + 1e-9) + 1 if step > 0 else 0
    except (ValueError, OverflowError) as error:
        raise RequestError(option, value, "must be a range such as 1..4 or 0..1/0.25") from error
    if not 0 < count <= MOST_CELLS:
        raise RequestError(option, value, f"is a range of {count} values; it must have 1 to {MOST_CELLS}")
    if low.is_integer() and step.is_integer():
        return [str(int(low) + number * int(step)) for number in range(count)]
    return [f"{low + number * step:.9g}" for number in range(count)]


def cells(request: Request, x: Axis, y: Axis | None) -> list[Cell]:
    """Return a cell for each pair of values, in the order with the fewest switches of models and of adapters.

    Cells of one model are together; within a model, cells with the same adapters are together.
    Raises RequestError when a value is not allowed.
    """
    rows: Sequence[str | None] = (None,) if y is None else y.values
    if y is not None and y.name == x.name:
        raise RequestError("y", y.name, "varies along x already")
    if len(x.values) * len(rows) > MOST_CELLS:
        raise RequestError("x", len(x.values) * len(rows), f"is too many cells; a grid has at most {MOST_CELLS}")
    names = {x.name} | ({y.name} if y is not None else set[str]())
    if "lora-strength" in names and "lora" not in names and not request.loras:
        raise RequestError("lora-strength", "", "needs an adapter: give --lora, or a lora axis")
    if "strength" in names and not request.image:
        raise RequestError("strength", "", "has no effect without --image")
    out: list[Cell] = []
    for row, y_value in enumerate(rows):
        for column, value in enumerate(x.values):
            varied = [(x, value)] + ([(y, y_value)] if y is not None and y_value is not None else [])
            cell_request = request
            # The strength applies to all adapters, including those of the other axis, so it comes last.
            for along, each in sorted(varied, key=lambda pair: pair[0].name == "lora-strength"):
                cell_request = AXES[along.name](cell_request, each, along.values[0])
            out.append(Cell(column, row, cell_request))
    seen: dict[object, int] = {}

    def first_seen_index(key: object) -> int:
        return seen.setdefault(key, len(seen))

    def combination(cell: Cell) -> tuple[int, int]:
        over = tuple(sorted(lora_to_tag(lora) for lora in cell.request.loras))
        return first_seen_index(cell.request.model), first_seen_index((cell.request.model, over))

    for cell in out:
        combination(cell)
    return sorted(out, key=combination)


def _number(name: str, kind: Callable[[str], float]) -> Callable[[Request, str, str], Request]:
    def varied(request: Request, value: str, _: str) -> Request:
        try:
            number = kind(value)
        except ValueError as error:
            raise RequestError(name, value, "must be a number") from error
        return replace(request, **{name: number})

    return varied


def _lora(request: Request, value: str, _: str) -> Request:
    """Add adapters to the request's own; ``value`` is ``NAME:STRENGTH``, several joined by ``+``, or ``none``."""
    try:
        more = () if value == NONE else tuple(parse_lora(part) for part in value.split("+"))
    except ValueError as error:
        raise RequestError("lora", value, str(error)) from error
    return replace(request, loras=(*request.loras, *more))


def _strength(request: Request, value: str, _: str) -> Request:
    try:
        strength = float(value)
    except ValueError as error:
        raise RequestError("lora-strength", value, "must be a number") from error
    return replace(request, loras=tuple(Lora(lora.name, strength, blocks=lora.blocks) for lora in request.loras))


def _part(request: Request, value: str, first: str) -> Request:
    """Replace ``first``, the axis's first value, in the prompt by ``value``."""
    if first not in request.prompt:
        raise RequestError(
            "prompt",
            first,
            "the first value of a prompt axis must be a part of the prompt; each other value replaces it there",
        )
    return replace(request, prompt=request.prompt.replace(first, value))


def _sampler(request: Request, value: str, _: str) -> Request:
    found = sampler_by_name(value)
    if found is None:
        raise RequestError("sampler", value, f"must be one of {', '.join(SAMPLERS)}")
    sampler, schedule = found
    return replace(request, sampler=sampler, schedule=request.schedule if schedule is None else schedule)


AXES: Mapping[str, Callable[[Request, str, str], Request]] = {
    "model": lambda request, value, _: replace(request, model=value),
    "lora": _lora,
    "lora-strength": _strength,
    "sampler": _sampler,
    "schedule": lambda request, value, _: replace(request, schedule=value),  # pyright: ignore[reportArgumentType]
    "steps": _number("steps", int),
    "cfg": _number("cfg", float),
    "guidance": _number("guidance", float),
    "shift": _number("shift", float),
    "seed": _number("seed", int),
    "strength": _number("strength", float),
    "clip-skip": _number("clip_skip", int),
    "prompt": _part,
}
"""For each axis the function that applies a value: (request, value, the axis's first value) to the new request."""
