"""A row of an architecture's table: a tensor as the module names it, its shape, and where files keep it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"[0-9]{1,4}")
"""Of a layer or block. Names come from files: ``isdigit`` would let in superscripts, and ``int`` has its own limit."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name to shape, of one component, without the component's prefix."""


class NotThisArchitecture(Exception):
    """The shapes do not describe this component; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place in which files keep a tensor.

    ``part`` is (index, count) when the tensor is one of ``count`` equal parts of the source's rows (a fused
    projection); ``transpose`` when a matrix is stored the other way round. Shapes that differ only in axes of size one
    count as equal: a 1×1 convolution and a linear layer hold the same bytes.
    """

    name: str
    part: tuple[int, int] | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """``name``: in the module's ``state_dict``. ``shape``: what the module expects. ``sources``: in order of trial."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def row(name: str, shape: tuple[int, ...], *others: str | Source) -> Row:
    """A row that files keep under its own name or under any of ``others``."""
    sources = [Source(name), *(other if isinstance(other, Source) else Source(other) for other in others)]
    return Row(name, shape, tuple(sources))


def weight_and_bias(name: str, weight: tuple[int, ...], *others: str) -> Iterator[Row]:
    """The two tensors of a layer whose bias has as many elements as its weight has rows."""
    yield row(f"{name}.weight", weight, *(f"{other}.weight" for other in others))
    yield row(f"{name}.bias", weight[:1], *(f"{other}.bias" for other in others))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of size one."""
    return tuple(n for n in shape if n != 1)


def count_indexed(names: Iterable[str], prefix: str) -> int:
    """How many consecutive numbers from 0 follow ``prefix`` in the names: layers, blocks."""
    found: set[int] = set()
    for name in names:
        if name.startswith(prefix):
            number = name[len(prefix) :].split(".", 1)[0]
            if _NUMBER.fullmatch(number):
                found.add(int(number))
    count = 0
    while count in found:
        count += 1
    return count
