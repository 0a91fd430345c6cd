"""The planner of one place.

It collects the input of :func:`safelight.memory.plan.plan`, and turns a refusal into an error or a smaller plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from safelight.devices.base import Device
from safelight.errors import OutOfMemoryError
from safelight.memory.account import BUFFERS
from safelight.memory.budget import Ledger
from safelight.memory.dequantiser import dequantised_bytes
from safelight.memory.lease import Lease, Use
from safelight.memory.plan import Plan, PlanInput, Refusal, plan
from safelight.memory.refusal import refusal_error
from safelight.memory.segment_table import SegmentTable
from safelight.memory.segments import needed_segments
from safelight.weights.manifest import ComponentManifest


@dataclass(eq=False)
class Planner:
    """Plans the segments in ``place``, within the ledger's budget for it.

    It has no lock of its own. Hold the residency's lock when you call it; the same lock guards the table.

    ``partial``: whether a component may be resident in part.
    ``max_bytes``: upper limit for weights; None for the whole budget.
    ``before_planning``: called before each plan; sets the ledger's budget to what the machine allows now.
    """

    table: SegmentTable
    device: Device
    ledger: Ledger
    place: str
    partial: bool
    max_bytes: int | None
    before_planning: Callable[[], None]

    def plan_new(self, lease: Lease) -> Plan | None:
        """Plan a new lease.

        Returns None if the lease must wait: there is too little room now, or only enough to stream, but a read or a
        prefetch is in progress. Plan again when it has ended.
        """
        self.table.evict_corrupted_or_unwanted(lease)
        self.before_planning()
        outcome = plan(self._plan_input(lease, pending_as_held=True))
        temporary = self.table.pending or (self.table.prefetches and lease not in self.table.prefetches)
        if temporary and (isinstance(outcome, Refusal) or outcome.slots):
            return None
        if isinstance(outcome, Refusal):
            # Tensors may be free by now, or only held by a reference cycle, such as an error and its frames.
            self.table.pool.collect()
            self.table.pool.trim()
            outcome = plan(self._plan_input(lease, pending_as_held=True))
        if isinstance(outcome, Refusal):
            raise self.refusal_error(lease.component, lease.use, outcome)
        return outcome

    def plan_running(self, lease: Lease) -> Plan | None:
        """Plan again for a lease that runs.

        If not even the minimum (with partial loading, the ring) fits in the budget:
        - with ``max_bytes``, the lease keeps its present plan;
        - without, this method raises the budget until the minimum fits.

        Returns None if the lease would lose resident segments while any read is in progress: wait for the read, then
        plan again.
        """
        self.before_planning()
        plan_input = self._plan_input(lease, pending_as_held=True)
        outcome = plan(plan_input)
        loses = isinstance(outcome, Refusal) or not outcome.staying.issuperset(lease.residents)
        if loses and self.table.pending:
            return None
        if isinstance(outcome, Refusal):
            lacking = outcome.least - outcome.available
            if self.max_bytes is not None:
                # The settings' limit must hold. The lease's current plan respects it.
                return lease.plan
            self.ledger.set_budget(self.place, self.ledger.budget(self.place) + lacking)
            outcome = plan(replace(plan_input, budget=plan_input.budget + lacking))
        if isinstance(outcome, Refusal):
            raise self.refusal_error(lease.component, lease.use, outcome)
        return outcome

    def plan_prefetch(self, lease: Lease) -> Plan | None:
        """Plan a prefetch. None: it would evict something, or it does not fit."""
        self.table.evict_corrupted_or_unwanted(lease)
        self.before_planning()
        outcome = plan(self._plan_input(lease, pending_as_held=True))
        return None if isinstance(outcome, Refusal) or outcome.pieces("drop") or outcome.slots else outcome

    def plan_dry_run(self, lease: Lease) -> Plan | Refusal:
        """Plan a lease that begins when the current reads are over. Nobody carries this plan out."""
        self.before_planning()
        return plan(self._plan_input(lease, pending_as_held=False))

    def plan_eviction(self) -> Plan | None:
        """Plan which pieces to evict so that the others fit in the budget.

        Returns None if the held pieces alone exceed the budget.
        """
        self.before_planning()
        outcome = plan(PlanInput(self._weight_budget(None), self.table.planner_view(None, pending_as_held=True), ()))
        return outcome if isinstance(outcome, Plan) else None

    def most_weight_bytes(self, working_bytes: int) -> int:
        """Return the most bytes of weights that may be in memory if nothing else is.

        ``working_bytes``: what computing with them needs besides.
        """
        self.before_planning()
        left = self.ledger.budget(self.place) - working_bytes
        return left if self.max_bytes is None else min(left, self.max_bytes)

    def min_weight_bytes(
        self, component: ComponentManifest, dtype: torch.dtype, unread: frozenset[str] = frozenset()
    ) -> int:
        """Return the smallest number of bytes of weights with which a component can run, however slowly.

        ``unread``: see :attr:`Use.unread`.
        """
        pieces = [segment.nbytes for segment in needed_segments(component, dtype, unread)]
        whole = sum(pieces)
        least = min(whole, (self.device.read_ahead + 1) * max(pieces)) if self.partial else whole
        return least + self.dequantised_bytes(component, dtype)

    def dequantised_bytes(self, component: ComponentManifest, dtype: torch.dtype) -> int:
        """Return the bytes that a lease needs to dequantise the component's weights, one operation after another."""
        return self.device.rounded(dequantised_bytes(component, dtype))

    def refusal_error(self, component: ComponentManifest, use: Use, refusal: Refusal) -> OutOfMemoryError:
        """Return the error that a lease of the component would raise for ``refusal``."""
        return refusal_error(
            component,
            use,
            refusal,
            self.place,
            self.ledger.budget(self.place),
            self._limit_if_smaller(use),
            self.partial,
        )

    def _limit_if_smaller(self, use: Use) -> int | None:
        """Return ``max_bytes`` if it leaves less for weights than the budget does, None otherwise."""
        ledger, place = self.ledger, self.place
        buffers = ledger.stored(place) - ledger.stored(place, besides=BUFFERS)
        left = ledger.budget(place) - use.working_bytes - buffers
        return self.max_bytes if self.max_bytes is not None and self.max_bytes < left else None

    def _plan_input(self, lease: Lease, *, pending_as_held: bool) -> PlanInput:
        """``pending_as_held``: see :meth:`SegmentTable.planner_view`."""
        return PlanInput(
            budget=self._weight_budget(lease),
            residents=self.table.planner_view(lease, pending_as_held=pending_as_held),
            needed=lease.needed,
            forward_passes=lease.use.forward_passes,
            upcoming=lease.use.upcoming,
            partial=self.partial,
            ahead=self.device.read_ahead,
        )

    def _weight_budget(self, lease: Lease | None) -> int:
        """Return the bytes for resident segments and the lease's ring.

        Two limits apply, and the smaller counts. The budget must hold everything: these weights, whatever else is
        stored, reserved working memory, and room for the components that the stage leases later. ``max_bytes`` must
        hold the same, except reserved memory and the buffers of modules. Buffers stay when weights are evicted, so they
        would make a limit fail later that was enough before.
        """
        table = self.table
        weights = table.resident_bytes + table.pending_bytes + table.pool.cached_bytes
        weights += lease.ring.nbytes if lease is not None and lease.ring is not None else 0
        reserved = self.ledger.reserved(self.place)
        if lease is not None and lease.reservation_entry is None:
            reserved += lease.use.working_bytes
        # A new lease leaves room for the components that the stage leases after it. When a running lease is planned
        # again, all of them have been leased, so the table already counts their segments.
        later = lease.use.min_bytes_of_later_leases if lease is not None and not lease.has_plan else 0
        if lease is not None and not lease.dequantiser.slab_bytes:
            later += lease.use.dequantised_bytes
        ledger, place = self.ledger, self.place
        free = ledger.budget(place) - reserved - later - (ledger.stored(place) - weights)
        if self.max_bytes is None:
            return free
        return min(free, self.max_bytes - later - (ledger.stored(place, besides=BUFFERS) - weights))
