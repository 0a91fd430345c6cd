"""Where the bytes of a segment come from: a file, into host memory; or host memory, onto a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import structlog
import torch

from safelight.devices import sums
from safelight.devices.pool import Slab
from safelight.devices.transfer import Transfers, read_all
from safelight.errors import TransferError
from safelight.memory.segments import Segment
from safelight.weights import store
from safelight.weights.manifest import ComponentManifest

if TYPE_CHECKING:
    from safelight.memory.residency import Lease, Residency

_log = structlog.get_logger(__name__)
Fetch = Callable[[Sequence[tuple[Segment, Slab]]], list[sums.Sum]]
"""Fills each slab with its segment, and returns when all bytes are there, verified; the sum of each as produced."""


class Source(Protocol):
    """Brings segments of a component in a dtype."""

    def opened(self, component: ComponentManifest, dtype: torch.dtype) -> AbstractContextManager[Fetch]:
        """A way to fetch the component's segments, as often as wanted while the context lasts."""
        ...


class FromFile:
    """Reads segments from the manifest's files into host memory, hashed and cast in the same pass."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @contextlib.contextmanager
    def opened(self, component: ComponentManifest, dtype: torch.dtype) -> Generator[Fetch]:
        del component

        def fetch(wanted: Sequence[tuple[Segment, Slab]]) -> list[sums.Sum]:
            reads = [
                read
                for segment, slab in wanted
                for read in store.reads(segment.tensors, store.views(slab.base, segment.tensors, dtype))
            ]
            produced = iter(read_all(reads, self._threads))
            return [sums.combined([next(produced) for _ in segment.tensors]) for segment, _ in wanted]

        yield fetch


class FromHost:
    """Copies segments from host memory, where ``host`` keeps or streams them, onto a device.

    ``keep``: what the host read stays there as long as there is room (``keep_ram_copy_of_weights``).
    """

    def __init__(self, host: Residency, transfers: Transfers, keep: bool) -> None:
        self.host = host
        self._transfers = transfers
        self._keep = keep

    @contextlib.contextmanager
    def opened(self, component: ComponentManifest, dtype: torch.dtype) -> Generator[Fetch]:
        with self.host.lease(component, dtype) as lease:

            def fetch(wanted: Sequence[tuple[Segment, Slab]]) -> list[sums.Sum]:
                return [self._push(lease, segment, slab) for segment, slab in wanted]

            yield fetch
        if not self._keep:
            self.host.drop(component.digest)

    def _push(self, lease: Lease, segment: Segment, slab: Slab) -> sums.Sum:
        index, target = segment.piece.index, slab.base[: segment.nbytes]
        try:
            with lease.held(index) as (source, produced):
                self._transfers.push(segment.label, source.base[: segment.nbytes], target)
                return produced
        except TransferError:
            _log.warning("a copy could not be repaired; its source is read again", what=segment.label)
        lease.renew(index)
        with lease.held(index) as (source, produced):
            self._transfers.push(segment.label, source.base[: segment.nbytes], target)
            self._transfers.counts.again += 1
            return produced


def measured(slab: Slab, segment: Segment) -> sums.Sum:
    """The sum of a segment's tensors where they are now, to be compared with that of their production."""
    views = store.views(slab.base, segment.tensors, segment.dtype)
    return sums.combined(sums.of(view) for view in views.values())
