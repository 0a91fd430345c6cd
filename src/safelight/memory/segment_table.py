"""The table of the segments in one place: which are in memory, and which leases hold them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import structlog

from safelight.devices.pool import SlabPool
from safelight.memory.lease import Coming, Held, Lease
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

    A segment is *coming* while a lease reads it, and then resident.

    The table has no lock of its own. The residency that owns it has a lock, and whoever uses the table holds that lock.

    ``pool``: the slabs.
    ``residents``: the resident segments.
    ``coming``: the segments that leases are reading.
    ``favours``: the leases of prefetches. The event of each is set when it ends.
    ``last_plan``: the last plan that a lease carried out.
    """

    pool: SlabPool
    residents: dict[Piece, Held] = field(init=False, default_factory=dict[Piece, Held])
    coming: dict[Piece, Coming] = field(init=False, default_factory=dict[Piece, Coming])
    favours: dict[Lease, threading.Event] = field(init=False, default_factory=dict[Lease, threading.Event])
    last_plan: Plan = field(init=False, default=Plan(()))
    _totals: dict[str, int] = field(init=False, default_factory=dict[str, int])
    _clock: int = field(init=False, default=0)

    @property
    def resident_bytes(self) -> int:
        """Bytes of slabs that hold resident segments, without ring slots."""
        return sum(held.target.slab.nbytes for held in self.residents.values())

    @property
    def coming_bytes(self) -> int:
        """Bytes of slabs into which segments are being read now."""
        return sum(coming.target.slab.nbytes for coming in self.coming.values())

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
        """Return all resident and coming segments, as the planner sees them for ``lease``.

        ``reading``: whether segments that are being read count as held. False: as if they were read already.
        """
        own = {} if lease is None else lease.residents
        residents = [
            Resident(piece, held.used, held.leases > (own.get(piece.index) is held))
            for piece, held in self.residents.items()
        ]
        return (*residents, *(Resident(piece, self._clock, reading) for piece in self.coming))

    def ends_of_others(self, lease: Lease) -> list[threading.Event]:
        """Return the events that are set when the current reads, and the other leases' prefetches, are over."""
        reads = [coming.over for coming in self.coming.values()]
        return reads + [over for favour, over in self.favours.items() if favour is not lease]

    # What a lease does to the table, from its plan to its end.

    def adopt(self, lease: Lease, new_plan: Plan) -> None:
        """Note the plan that a lease carries out from now on, and the sizes of its components for the reports."""
        lease.plan = self.last_plan = new_plan
        total = sum(segment.nbytes for segment in lease.segments)
        self._totals |= {piece.component: total for piece in lease.pieces}
        self._totals[lease.key] = sum(piece.nbytes for piece in lease.pieces if piece.component == lease.key)

    @staticmethod
    def hold(lease: Lease, held: Held) -> None:
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
        """Take slabs for the segments that the lease will read. They are coming from now on."""
        for segment in missing:
            target = Target.of(segment, self.pool.take(segment.nbytes, lease.key, segment.label))
            coming = Coming(target, [lease])
            self.coming[segment.piece] = coming
            lease.coming.append(coming)

    def receive(self, lease: Lease, proofs: Sequence[Proof]) -> None:
        """Make the segments that the lease has read resident. All leases that waited for them hold them."""
        for coming, proof in zip(lease.coming, proofs, strict=True):
            piece = coming.target.segment.piece
            held = Held(coming.target, proof, used=self._clock, unwanted=coming.unwanted)
            self.residents[piece] = held
            del self.coming[piece]
            for waiting in coming.waiting:
                self.hold(waiting, held)
            coming.over.set()
        lease.coming = []

    def abandon(self, lease: Lease) -> None:
        """Return the slabs of coming segments that the lease did not read."""
        for coming in lease.coming:
            piece = coming.target.segment.piece
            if self.coming.get(piece) is coming:
                del self.coming[piece]
                coming.target.tensors.clear()
                self.pool.give(coming.target.slab)
            coming.over.set()
        lease.coming = []

    def mark_used(self, lease: Lease) -> None:
        """Make the segments that a lease holds the most recently used ones."""
        self._clock += 1
        for held in lease.residents.values():
            held.used = self._clock

    def release_all(self, lease: Lease) -> None:
        """End everything that a lease holds, reads or waits for."""
        self.abandon(lease)
        for coming in self.coming.values():
            if lease in coming.waiting:
                coming.waiting.remove(lease)
        for held in lease.residents.values():
            self.release(held)
        lease.residents = {}

    def release(self, held: Held) -> None:
        """Hold a segment once less. If it is wrong or unwanted and nobody holds it now, evict it."""
        held.leases -= 1
        piece = held.target.segment.piece
        if held.passing and self.residents.get(piece) is held:
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

    def evict_passing(self, lease: Lease) -> None:
        """Evict the lease's segments that are known to be wrong or unwanted, so that it does not use them."""
        for piece, held in list(self.residents.items()):
            if held.passing and piece in lease.pieces:
                self.evict(piece)

    def evict_free(self, digests: Collection[str] | None) -> None:
        """Evict the segments of the components with ``digests`` (None: all) that no lease holds.

        Segments that are being read are evicted as soon as no lease holds them.
        """
        for piece, held in list(self.residents.items()):
            if not held.leases and piece.is_of(digests):
                self.evict(piece)
        for piece, coming in self.coming.items():
            coming.unwanted |= piece.is_of(digests)
