"""Rows of an architecture's table: a tensor's name in the module, its shape, and its names in files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from safelight.files.header import Header

_NUMBER = re.compile(r"[0-9]{1,4}")
"""Number of a layer or block. The names come from files, so ``isdigit`` is too weak (it accepts superscripts), and the
length is bounded because ``int`` raises for too many digits."""

Rows = tuple[tuple[int, int], ...]
"""Rows of a tensor, piece by piece: the first row and the number of rows of each piece."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of one component, by name without the component's prefix."""


class NotThisArchitecture(Exception):
    """The shapes do not describe this component. The message says which tensor is missing.

    ``tensor``: the name of the tensor whose shape is wrong, "" if the message says all.
    """

    def __init__(self, message: str, tensor: str = "") -> None:
        super().__init__(message)
        self.tensor = tensor


def is_architecture(infer: Callable[[Shapes], object], header: Header | None) -> bool:
    """Return whether the settings of a component can be inferred from a header. ``header``: None if it is not there."""
    if header is None:
        return False
    try:
        infer({name: info.shape for name, info in header.tensors.items()})
    except NotThisArchitecture:
        return False
    return True


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A name under which files store a tensor.

    ``chunk``: (index, count) if the tensor is one of ``count`` equal parts of the source's rows (a fused projection).
    ``rows``: (first, total) if the tensor begins at row ``first`` of a source with ``total`` rows (unequal parts).
    ``transpose``: the file stores the matrix transposed.
    ``swap_halves``: the file stores the second half of the rows before the first.
    ``flattened``: the file may store the tensor as one row.

    Shapes that differ only in axes of size 1 count as equal: a 1×1 convolution and a linear layer have the same bytes.
    """

    name: str
    chunk: tuple[int, int] | None = None
    transpose: bool = False
    rows: tuple[int, int] | None = None
    swap_halves: bool = False
    flattened: bool = False

    @property
    def in_order(self) -> bool:
        """Whether the rows of the source are those of the tensor: all of them, in the same order."""
        return self.chunk is None and self.rows is None and not self.swap_halves

    def pieces(self, count: int) -> Rows:
        """Return which rows of the source are the tensor's, in the tensor's order. ``count``: the tensor's rows."""
        if self.swap_halves:
            return (count // 2, count - count // 2), (0, count // 2)
        return ((self.part(count)[0], count),)

    def part(self, count: int) -> tuple[int, int]:
        """Return the first row in the source, and the rows of the whole source. ``count``: the tensor's rows."""
        if self.chunk is not None:
            return self.chunk[0] * count, self.chunk[1] * count
        return self.rows or (0, count)

    def fits(self, shape: tuple[int, ...], in_file: tuple[int, ...]) -> bool:
        """Return whether a tensor has the right shape. ``shape``: in the module. ``in_file``: of the source."""
        if self.chunk is not None or self.rows is not None:
            if not in_file or in_file[0] != self.part(shape[0])[1]:
                return False
            in_file = (shape[0], *in_file[1:])
        if self.transpose:
            return in_file == shape[::-1]
        same = in_file == shape or squeezed(in_file) == squeezed(shape)
        return same or (self.flattened and squeezed(in_file) == (math.prod(shape),))


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of an architecture.

    ``name``: its name in the module's ``state_dict``.
    ``shape``: the shape that the module expects.
    ``sources``: its names in files; the first one that a file has is used.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[TensorSource, ...]


def row(name: str, shape: tuple[int, ...], *others: str | TensorSource) -> TensorRow:
    """Return the row of a tensor that files store under its own name or under any of ``others``."""
    sources = [
        TensorSource(name),
        *(other if isinstance(other, TensorSource) else TensorSource(other) for other in others),
    ]
    return TensorRow(name, shape, tuple(sources))


def weight_and_bias(name: str, weight: tuple[int, ...], *others: str) -> Iterator[TensorRow]:
    """Yield the two tensors of a layer. Its bias has as many elements as its weight has rows."""
    yield row(f"{name}.weight", weight, *(f"{other}.weight" for other in others))
    yield row(f"{name}.bias", weight[:1], *(f"{other}.bias" for other in others))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without axes of size 1."""
    return tuple(n for n in shape if n != 1)


def count_indexed(names: Iterable[str], prefix: str) -> int:
    """Count the consecutive numbers, from 0, that follow ``prefix`` in the names: layers or blocks."""
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


def without_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """Return a name without the first of the prefixes with which it begins; None if it begins with none of them."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return None if found is None else name.removeprefix(found)


def reason_by_component(name: str, *components: tuple[Iterable[str], Callable[[str], str | None]]) -> str | None:
    """Return why a single file may have a tensor that no module needs; None if it may not.

    ``components``: for each component the prefixes of its tensors, and a function that answers for their names.
    """
    for prefixes, reason in components:
        inner = without_prefix(name, prefixes)
        if inner is not None:
            return reason(inner)
    return None
