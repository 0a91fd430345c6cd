"""A component under the names that files of the original have: tables of tensors, read backwards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from safelight.families.tables import TensorRow, TensorSource

ORIGINAL = 1
"""Index of the original's name among those of a tensor. 0 is the name in the module."""


@dataclass(frozen=True, slots=True)
class FusedPiece:
    """A tensor of the module as a part of a tensor in the file. ``source``: how the file has it."""

    name: str
    source: TensorSource


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file.

    ``shape``: in the file.
    ``pieces``: the module's tensors that it has, one below the other.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[FusedPiece, ...]


def in_original_names(rows: Iterable[TensorRow]) -> list[FileTensor]:
    """Return the tensors that a file of the original has, in the order of the table.

    Raises ValueError if the table has only a part of a fused tensor.
    """
    found: dict[str, list[tuple[int, TensorRow, TensorSource]]] = {}
    for row in rows:
        source = row.sources[min(ORIGINAL, len(row.sources) - 1)]
        found.setdefault(source.name, []).append((source.part(row.shape[0])[0], row, source))
    return [_joined(name, sorted(parts, key=lambda part: part[0])) for name, parts in found.items()]


def _joined(name: str, parts: list[tuple[int, TensorRow, TensorSource]]) -> FileTensor:
    _, row, source = parts[0]
    pieces = tuple(FusedPiece(one.name, how) for _, one, how in parts)
    if source.transpose:
        return FileTensor(name, row.shape[::-1], pieces)
    if source.flattened:
        return FileTensor(name, (math.prod(row.shape),), pieces)
    count, whole = sum(one.shape[0] for _, one, _ in parts), source.part(row.shape[0])[1]
    if count != whole:
        raise ValueError(f"{name} has {whole} rows, and the table has {count} of them")
    return FileTensor(name, (count, *row.shape[1:]), pieces)
