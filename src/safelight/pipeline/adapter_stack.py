"""Stacks adapters over a component: which of their changes apply to a tensor, with which strength, in which order.

The weight is first cast to the dtype in which the model runs. The differences are then computed and added in fp32, in
the order of the adapters' digests, and the sum is rounded once. So neither the order in the request nor earlier jobs
change any bit. An adapter with strength 0 is left out. After that, the vectors of textual inversions replace whole
rows.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from safelight.errors import IntegrityError
from safelight.memory.lease import Lease
from safelight.weights.adapter_formulas import (
    DEVICE_CHUNK_ELEMENTS,
    AppliedChange,
    add_products,
    changing,
    is_low_rank,
    reads_weight,
)
from safelight.weights.adapter_mapping import WeightChange
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest, ManifestTensor
from safelight.weights.overlay import Bring, OpenedOverlays, Overlay, with_overlays

Leasing = Callable[[ComponentManifest], AbstractContextManager[Lease]]
"""Leases an adapter's tensors in host memory, fp32."""

TENSORS_AT_ONCE = 6
"""How many fp32 tensors of the size of a weight exist while an overlay is computed that is more than plain LoRAs."""


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
    needed = (
        _numbers_at_once(tensor, changes_by_weight.get(tensor.name, ()))
        for tensor in underlying.tensors
        if tensor.name in touched
    )
    sources = {item.source.digest: item.source for item in (*active, *replacements)}

    @contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        with ExitStack() as stack:
            leases = {
                digest: _VerifiedLease(stack.enter_context(leasing(held)), bring) for digest, held in sources.items()
            }

            def follow_budget() -> None:
                for one in leases.values():
                    one.follow_budget()

            overlays = {name: _overlay(changes_by_weight.get(name, ()), rows.get(name, ()), leases) for name in touched}
            yield OpenedOverlays(overlays, follow_budget)
            # A weight that stays quantised uses its adapters until the end, so they must still be right.
            for one in leases.values():
                one.verify_again()

    content = hash_texts(
        *(layer.content_key for layer in active), *sorted(replacement.content_key for replacement in replacements)
    )
    working_bytes = max(needed) * torch.float32.itemsize
    return with_overlays(underlying, content, frozenset(touched), open_overlays, working_bytes, tuple(sorted(sources)))


class _VerifiedLease:
    """A lease whose bytes are verified once, before the first use. ``bring``: brings tensors to where they are used."""

    def __init__(self, lease: Lease, bring: Bring) -> None:
        self._lease, self._bring, self._verified = lease, bring, False
        # Several threads may compute overlays at once.
        self._lock = threading.Lock()
        self._users = 0

    def follow_budget(self) -> None:
        """Adapt the lease to the current budget, unless its tensors are in use."""
        with self._lock:
            if not self._users:
                self._lease.adjust()

    def verify_again(self) -> None:
        """Verify the bytes again if they were used. Raises IntegrityError."""
        if self._verified:
            self._verify()

    def _verify(self) -> None:
        for index, resident in list(self._lease.residents.items()):
            if not self._lease.verify_segment(index):
                resident.corrupted = True
                first = resident.buffer.segment.tensors[0]
                raise IntegrityError(first.path, first.name, "was corrupted in memory", "It will be read again.")

    @contextmanager
    def use_tensors(self, names: Sequence[str]) -> Generator[list[torch.Tensor]]:
        """Yield the named tensors. Raises IntegrityError if bytes in memory changed since they were read."""
        with self._lock:
            self._users += 1
        try:
            if not self._verified:
                self._verify()
                self._verified = True
            with self._lease.use_tensors(names) as tensors:
                digest = self._lease.component.digest[:16]
                brought = [self._bring(f"adapter {digest} {n}", one) for n, one in zip(names, tensors, strict=True)]
                tensors.clear()
                yield brought
        finally:
            with self._lock:
                self._users -= 1


def _numbers_at_once(tensor: ManifestTensor, changes: Sequence[tuple[AdapterLayer, WeightChange, float]]) -> int:
    """Return how many numbers in fp32 exist while a tensor's overlay is computed."""
    elements = math.prod(tensor.shape)
    if all(is_low_rank(change.kind, change.slots) for _, change, _ in changes):
        return min(elements, DEVICE_CHUNK_ELEMENTS)
    return elements * TENSORS_AT_ONCE


def _active_changes(layer: AdapterLayer) -> tuple[tuple[WeightChange, float], ...]:
    return tuple((change, strength) for change, strength in layer.changes if strength != 0)


def _overlay(
    changes: Sequence[tuple[AdapterLayer, WeightChange, float]],
    replacements: Sequence[RowReplacement],
    leases: Mapping[str, _VerifiedLease],
) -> Overlay:
    @contextmanager
    def opened(layer: AdapterLayer, change: WeightChange, strength: float) -> Generator[AppliedChange]:
        with leases[layer.source.digest].use_tensors(list(change.slots.values())) as tensors:
            slots = dict(zip(change.slots, tensors, strict=True))
            tensors.clear()
            yield AppliedChange(change, slots, strength, layer.scale)
            slots.clear()

    def apply(weight: torch.Tensor) -> None:
        if changes and all(is_low_rank(change.kind, change.slots) for _, change, _ in changes):
            with ExitStack() as used:
                add_products(weight, [used.enter_context(opened(*one)) for one in changes])
        elif changes:
            # One after the other: each may be as large as the weight.
            with changing(weight, any(reads_weight(change) for _, change, _ in changes)) as add:
                for one in changes:
                    with opened(*one) as applied:
                        add(applied)
        for replacement in replacements:
            with leases[replacement.source.digest].use_tensors([replacement.tensor_name]) as tensors:
                weight[list(replacement.rows)] = tensors.pop().to(weight.dtype)

    return apply
