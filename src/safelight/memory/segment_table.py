"""The table of the segments in one place: which are in memory, and which leases hold them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import structlog

from safelight.devices.pool import SlabPool
from safelight.memory.lease import Lease, PendingRead, ResidentSegment
from safelight.memory.plan import Piece, Plan, Resident
from safelight.memory.segments import Segment
from safelight.memory.source import Proof, Target

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """A report line: ``nbytes`` of a component's ``total`` bytes are resident, and ``leases`` leases hold it."""

    component: str
    nbytes: int
    total: int
    leases: int


@dataclass(eq=False)
class SegmentTable:
    """The segments in one place, the slabs that they occupy, and the leases that hold them.

    A segment is *pending* while a lease reads it, and then resident.

    The table has no lock of its own. The residency that owns it has a lock, and whoever uses the table holds that lock.

    ``pool``: the slabs.
    ``residents``: the resident segments.
    ``pending``: the segments that leases are reading.
    ``prefetches``: the leases of prefetches. The event of each is set when it ends.
    ``last_plan``: the last plan that a lease carried out.
    """

    pool: SlabPool
    residents: dict[Piece, ResidentSegment] = field(init=False, default_factory=dict[Piece, ResidentSegment])
    pending: dict[Piece, PendingRead] = field(init=False, default_factory=dict[Piece, PendingRead])
    prefetches: dict[Lease, threading.Event] = field(init=False, default_factory=dict[Lease, threading.Event])
    last_plan: Plan = field(init=False, default=Plan(()))
    _totals: dict[str, int] = field(init=False, default_factory=dict[str, int])
    _clock: int = field(init=False, default=0)

    @property
    def resident_bytes(self) -> int:
        """Bytes of slabs that hold resident segments, without ring slots."""
        return sum(held.target.slab.nbytes for held in self.residents.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of slabs into which segments are being read now."""
        return sum(pending.target.slab.nbytes for pending in self.pending.values())

    def holdings(self) -> list[Holding]:
        """Return the resident bytes of each component."""
        keys = dict.fromkeys(piece.component for piece in self.residents)
        found: list[Holding] = []
        for key in keys:
            held = [h for piece, h in self.residents.items() if piece.component == key]
            nbytes, leases = sum(h.target.slab.nbytes for h in held), max(h.leases for h in held)
            found.append(Holding(key, nbytes, self._totals[key], leases))
        return found

    def pieces_for(self, lease: Lease | None, reading: bool) -> tuple[Resident, ...]:
        """Return all resident and pending segments, as the planner sees them for ``lease``.

        ``reading``: treat segments that are being read as held (True), or as evictable residents (False).
        """
        own = {} if lease is None else lease.residents
        residents = [
            Resident(piece, held.used, held.leases > (own.get(piece.index) is held))
            for piece, held in self.residents.items()
        ]
        return (*residents, *(Resident(piece, self._clock, reading) for piece in self.pending))

    def ends_of_others(self, lease: Lease) -> list[threading.Event]:
        """Return the events that are set when the current reads, and the other leases' prefetches, are over."""
        reads = [pending.finished for pending in self.pending.values()]
        return reads + [finished for prefetch, finished in self.prefetches.items() if prefetch is not lease]

    # What a lease does to the table, from its plan to its end.

    def adopt(self, lease: Lease, new_plan: Plan) -> None:
        """Note the plan that a lease carries out from now on, and the sizes of its components for the reports."""
        lease.plan = self.last_plan = new_plan
        total = sum(segment.nbytes for segment in lease.segments)
        self._totals |= {piece.component: total for piece in lease.pieces}
        self._totals[lease.key] = sum(piece.nbytes for piece in lease.pieces if piece.component == lease.key)

    @staticmethod
    def hold(lease: Lease, held: ResidentSegment) -> None:
        """Let a lease hold a resident segment."""
        if held.target.segment.piece.index not in lease.residents:
            held.leases += 1
            lease.residents[held.target.segment.piece.index] = held

    @staticmethod
    def stop_holding(lease: Lease, indices: Collection[int]) -> None:
        """Let a lease, which streams these segments from now on, no longer hold them. They stay in memory."""
        for index in indices:
            held = lease.residents.pop(index)
            held.leases -= 1

    def expect(self, lease: Lease, missing: Sequence[Segment]) -> None:
        """Take slabs for the segments that the lease will read. They are pending from now on."""
        for segment in missing:
            target = Target.of(segment, self.pool.take(segment.nbytes, lease.key, segment.label))
            pending = PendingRead(target, [lease])
            self.pending[segment.piece] = pending
            lease.pending.append(pending)

    def receive(self, lease: Lease, proofs: Sequence[Proof]) -> None:
        """Make the segments that the lease has read resident. All leases that waited for them hold them."""
        for pending, proof in zip(lease.pending, proofs, strict=True):
            piece = pending.target.segment.piece
            held = ResidentSegment(pending.target, proof, used=self._clock, unwanted=pending.unwanted)
            self.residents[piece] = held
            del self.pending[piece]
            for waiting in pending.waiting:
                self.hold(waiting, held)
            pending.finished.set()
        lease.pending = []

    def abandon(self, lease: Lease) -> None:
        """Return the slabs of pending segments that the lease did not read."""
        for pending in lease.pending:
            piece = pending.target.segment.piece
            if self.pending.get(piece) is pending:
                del self.pending[piece]
                pending.target.tensors.clear()
                self.pool.give(pending.target.slab)
            pending.finished.set()
        lease.pending = []

    def mark_used(self, lease: Lease) -> None:
        """Make the segments that a lease holds the most recently used ones."""
        self._clock += 1
        for held in lease.residents.values():
            held.used = self._clock

    def release_all(self, lease: Lease) -> None:
        """End everything that a lease holds, reads or waits for."""
        self.abandon(lease)
        for pending in self.pending.values():
            if lease in pending.waiting:
                pending.waiting.remove(lease)
        for held in lease.residents.values():
            self.release(held)
        lease.residents = {}

    def release(self, held: ResidentSegment) -> None:
        """Remove one hold of a segment. If it is wrong or unwanted and nobody holds it now, evict it."""
        held.leases -= 1
        piece = held.target.segment.piece
        if held.must_evict and self.residents.get(piece) is held:
            self.evict(piece)

    # Evicting.

    def evict(self, piece: Piece) -> None:
        """Evict a resident segment."""
        held = self.residents.pop(piece)
        held.target.tensors.clear()
        if not self.pool.give(held.target.slab):
            what = held.target.segment.label
            _log.warning("a tensor is still referenced after its binding ended; its memory is not reused", what=what)

    def evict_dropped(self, new_plan: Plan) -> None:
        """Evict the pieces that a plan drops, if they are still resident and no lease holds them."""
        for piece in new_plan.pieces("drop"):
            held = self.residents.get(piece)
            if held is not None and not held.leases:
                self.evict(piece)

    def evict_due(self, lease: Lease) -> None:
        """Evict the lease's segments that are known to be wrong or unwanted, so that it does not use them."""
        for piece, held in list(self.residents.items()):
            if held.must_evict and piece in lease.pieces:
                self.evict(piece)

    def evict_free(self, digests: Collection[str] | None) -> None:
        """Evict the segments of the components with ``digests`` (None: all) that no lease holds.

        Segments that are being read are evicted as soon as no lease holds them.
        """
        for piece, held in list(self.residents.items()):
            if not held.leases and piece.is_of(digests):
                self.evict(piece)
        for piece, pending in self.pending.items():
            pending.unwanted |= piece.is_of(digests)
