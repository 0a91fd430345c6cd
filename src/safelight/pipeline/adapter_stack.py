"""Stacks adapters over a component: which of their changes apply to a tensor, with which strength, in which order.

The weight is first cast to the dtype in which the model runs. The differences are then computed and added in fp32, in
the order of the adapters' digests, and the sum is rounded once. So neither the order in the request nor earlier jobs
change any bit. An adapter with strength 0 is left out. After that, the vectors of textual inversions replace whole
rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from safelight.errors import IntegrityError
from safelight.memory.lease import Lease
from safelight.weights.adapter_formulas import add, reads_weight
from safelight.weights.adapter_mapping import WeightChange
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Overlay, with_overlays

Leasing = Callable[[ComponentManifest], AbstractContextManager[Lease]]
"""Leases an adapter's tensors in host memory, fp32."""

TENSORS_AT_ONCE = 4
"""How many fp32 tensors of the size of the largest weight exist while an overlay is computed."""


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """The changes of one adapter to one component.

    ``source``: the adapter's component, which has the tensors.
    ``changes``: each change with its strength.
    ``scale``: factor for an adapter without an alpha; None for 1.
    """

    source: ComponentManifest
    changes: tuple[tuple[WeightChange, float], ...]
    scale: float | None = None

    @property
    def content_key(self) -> str:
        """A text that identifies the layer's effect: tensors, scale and strengths."""
        strengths = sorted((change.target, strength) for change, strength in self.changes)
        return json.dumps([self.source.digest, self.scale, strengths])


@dataclass(frozen=True, slots=True)
class RowReplacement:
    """Vectors that replace rows of a weight, for textual inversion.

    ``source``: the adapter's component, which has the vectors.
    ``tensor_name``: the name of their tensor, (n, width).
    ``target``, ``rows``: the weight, and the n rows to replace.
    """

    source: ComponentManifest
    tensor_name: str
    target: str
    rows: tuple[int, ...]

    @property
    def content_key(self) -> str:
        return json.dumps([self.source.digest, self.tensor_name, self.target, self.rows])


def stack_adapters(
    underlying: ComponentManifest,
    layers: Sequence[AdapterLayer],
    leasing: Leasing,
    replacements: Sequence[RowReplacement] = (),
) -> ComponentManifest:
    """Return the underlying component with ``layers`` added and rows replaced. If they change nothing, return it.

    ``leasing``: leases the tensors of a layer or of replacing vectors while overlays are computed.
    """
    active = [AdapterLayer(layer.source, _active_changes(layer), layer.scale) for layer in layers]
    active = sorted((layer for layer in active if layer.changes), key=lambda layer: layer.content_key)
    if not active and not replacements:
        return underlying
    changes_by_weight: dict[str, list[tuple[AdapterLayer, WeightChange, float]]] = {}
    for layer in active:
        for change, strength in layer.changes:
            changes_by_weight.setdefault(change.target, []).append((layer, change, strength))
    rows: dict[str, list[RowReplacement]] = {}
    for replacement in sorted(replacements, key=lambda replacement: replacement.content_key):
        rows.setdefault(replacement.target, []).append(replacement)
    touched = changes_by_weight.keys() | rows.keys()
    largest = max(math.prod(tensor.shape) for tensor in underlying.tensors if tensor.name in touched)
    sources = {item.source.digest: item.source for item in (*active, *replacements)}

    @contextmanager
    def open_overlays() -> Generator[Mapping[str, Overlay]]:
        with ExitStack() as stack:
            leases = {digest: _VerifiedLease(stack.enter_context(leasing(held))) for digest, held in sources.items()}
            yield {
                name: Overlay(_overlay_function(changes_by_weight.get(name, ()), rows.get(name, ()), leases))
                for name in touched
            }

    content = hash_texts(
        *(layer.content_key for layer in active), *sorted(replacement.content_key for replacement in replacements)
    )
    working_bytes = TENSORS_AT_ONCE * largest * torch.float32.itemsize
    return with_overlays(underlying, content, frozenset(touched), open_overlays, working_bytes, tuple(sorted(sources)))


class _VerifiedLease:
    """A lease whose bytes are verified once, before the first use."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._verified = lease, False

    def lease(self) -> Lease:
        """Return the verified lease. Raises IntegrityError if bytes in memory differ from those that were read."""
        if not self._verified:
            for index, resident in self._lease.residents.items():
                if not self._lease.verify_segment(index):
                    first = resident.buffer.segment.tensors[0]
                    raise IntegrityError(first.path, first.name, "was corrupted in memory", "It will be read again.")
            self._verified = True
        return self._lease


def _active_changes(layer: AdapterLayer) -> tuple[tuple[WeightChange, float], ...]:
    return tuple((change, strength) for change, strength in layer.changes if strength != 0)


def _overlay_function(
    changes: Sequence[tuple[AdapterLayer, WeightChange, float]],
    replacements: Sequence[RowReplacement],
    leases: Mapping[str, _VerifiedLease],
) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(weight: torch.Tensor) -> torch.Tensor:
        wide = weight.float()
        total = wide.clone() if wide is weight or any(reads_weight(change) for _, change, _ in changes) else wide
        for layer, change, strength in changes:
            with leases[layer.source.digest].lease().use_tensors(list(change.slots.values())) as tensors:
                slots = dict(zip(change.slots, tensors, strict=True))
                tensors.clear()
                add(total, change, slots, wide, strength, layer.scale)
                slots.clear()
        for replacement in replacements:
            with leases[replacement.source.digest].lease().use_tensors([replacement.tensor_name]) as tensors:
                total[list(replacement.rows)] = tensors.pop()
        return total.to(weight.dtype)

    return apply
