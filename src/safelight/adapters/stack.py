"""Adapters over a component: which of their parts change which tensor, how strongly, in which order.

Differences are computed in fp32 from the weight as it would be bound, added to it in the order of the adapters'
digests, and rounded once; so neither the order in which they were asked for nor what was made before changes a bit. An
adapter of strength 0 is not there at all. Vectors of textual inversions then take the place of whole rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from safelight.adapters.differences import add
from safelight.errors import IntegrityError
from safelight.formats.keys.adapters import Part
from safelight.memory.lease import Lease
from safelight.weights.digest import named
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Overlay, adapted

Leasing = Callable[[ComponentManifest], AbstractContextManager[Lease]]
"""Holds an adapter's tensors in host memory, fp32."""

TENSORS_AT_ONCE = 4
"""As large as the largest weight, in fp32, that live while something is laid over it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapter over one component. ``parts``: with the strength of each; ``scales``: see
    :func:`safelight.adapters.differences.difference`."""

    tensors: ComponentManifest
    parts: tuple[tuple[Part, float], ...]
    scale: float | None = None

    @property
    def content(self) -> str:
        """Everything that decides what the layer does, as text."""
        strengths = sorted((part.target, strength) for part, strength in self.parts)
        return json.dumps([self.tensors.digest, self.scale, strengths])


@dataclass(frozen=True, slots=True)
class Inserted:
    """Vectors that take the place of rows of a weight: the tensor ``source`` (n, width) of ``tensors`` that of the rows
    ``rows`` of the weight ``target``."""

    tensors: ComponentManifest
    source: str
    target: str
    rows: tuple[int, ...]

    @property
    def content(self) -> str:
        return json.dumps([self.tensors.digest, self.source, self.target, self.rows])


def over(
    base: ComponentManifest, layers: Sequence[Layer], leasing: Leasing, inserted: Sequence[Inserted] = ()
) -> ComponentManifest:
    """The component under these layers, with these vectors inserted; the base itself when nothing changes anything."""
    doing = [Layer(layer.tensors, _doing(layer), layer.scale) for layer in layers]
    doing = sorted((layer for layer in doing if layer.parts), key=lambda layer: layer.content)
    if not doing and not inserted:
        return base
    sums: dict[str, list[tuple[Layer, Part, float]]] = {}
    for layer in doing:
        for part, strength in layer.parts:
            sums.setdefault(part.target, []).append((layer, part, strength))
    rows: dict[str, list[Inserted]] = {}
    for one in sorted(inserted, key=lambda one: one.content):
        rows.setdefault(one.target, []).append(one)
    touched = sums.keys() | rows.keys()
    largest = max(math.prod(tensor.shape) for tensor in base.tensors if tensor.name in touched)
    tensors = {one.tensors.digest: one.tensors for one in (*doing, *inserted)}

    @contextmanager
    def recipes() -> Generator[Mapping[str, Overlay]]:
        with ExitStack() as stack:
            leases = {digest: _Proven(stack.enter_context(leasing(held))) for digest, held in tensors.items()}
            yield {name: Overlay(_recipe(sums.get(name, ()), rows.get(name, ()), leases)) for name in touched}

    content = named(*(layer.content for layer in doing), *sorted(one.content for one in inserted))
    working = TENSORS_AT_ONCE * largest * torch.float32.itemsize
    return adapted(base, content, frozenset(touched), recipes, working, tuple(sorted(tensors)))


class _Proven:
    """A lease whose bytes are summed before anything is computed from them, once."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._proven = lease, False

    def lease(self) -> Lease:
        """Raises IntegrityError when what is in memory is not what was read."""
        if not self._proven:
            for index, held in self._lease.residents.items():
                if not self._lease.intact(index):
                    first = held.target.segment.tensors[0]
                    raise IntegrityError(first.path, first.name, "was spoiled in memory", "It is read again.")
            self._proven = True
        return self._lease


def _doing(layer: Layer) -> tuple[tuple[Part, float], ...]:
    return tuple((part, strength) for part, strength in layer.parts if strength != 0)


def _recipe(
    what: Sequence[tuple[Layer, Part, float]], inserted: Sequence[Inserted], leases: Mapping[str, _Proven]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def made(weight: torch.Tensor) -> torch.Tensor:
        wide = weight.float()
        total = wide.clone() if wide is weight or any(_reads(part) for _, part, _ in what) else wide
        for layer, part, strength in what:
            with leases[layer.tensors.digest].lease().pinned(list(part.slots.values())) as tensors:
                slots = dict(zip(part.slots, tensors, strict=True))
                tensors.clear()
                add(total, part, slots, wide, strength, layer.scale)
                slots.clear()
        for one in inserted:
            with leases[one.tensors.digest].lease().pinned([one.source]) as tensors:
                total[list(one.rows)] = tensors.pop()
        return total.to(weight.dtype)

    return made


def _reads(part: Part) -> bool:
    """Whether what it adds depends on the weight."""
    return "dora_scale" in part.slots or "magnitude" in part.slots
