"""Prefetching: loads a component before anybody needs it, and never at the cost of another job."""

from __future__ import annotations

import torch

from safelight.devices.failures import translate_torch_errors
from safelight.memory.lease import ONCE, Lease, Use
from safelight.memory.residency import Residency
from safelight.memory.segments import Segment
from safelight.weights.manifest import ComponentManifest

AT_ONCE = 64 << 20
"""Bytes of a batch. The free room is checked again after each batch. Host copies are held only during a batch."""


def prefetch_component(residency: Residency, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE) -> bool:
    """Load as much of a component as fits without evicting anything, and return whether all of it is resident.

    ``use``: of it only :attr:`Use.unread` counts: those segments are not loaded.
    Nothing is held afterwards. Loading stops as soon as another lease waits for room.
    """
    lease = Lease(component, dtype, use, residency)
    while True:
        with (
            residency.source.open(component, dtype, background=True, unread=use.unread) as lease.fetcher,
            translate_torch_errors(f"Loading the {component.role}"),
        ):
            if not _begin(residency, lease):
                break
            try:
                residency.read(lease)
            finally:
                with residency.lock:
                    residency.table.release_all(lease)
    return residency.are_resident(lease.needed)


def _begin(residency: Residency, lease: Lease) -> bool:
    """Take slabs for the next batch of segments. False if none is missing, or no more room is free."""
    with residency.lock:
        outcome = residency.planner.plan_prefetch(lease)
        if outcome is None or residency.has_waiting_lease:
            return False
        table = residency.table
        table.adopt(lease, outcome)
        batch: list[Segment] = []
        for piece in outcome.pieces("load"):
            if batch and sum(segment.nbytes for segment in batch) + piece.nbytes > AT_ONCE:
                break
            batch.append(lease.segments[piece.index])
        try:
            table.begin_reads(lease, batch)
        except BaseException:
            table.release_all(lease)
            raise
        return bool(batch)
