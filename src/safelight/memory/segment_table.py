"""The table of the segments in one place: which are in memory, and which leases hold them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from safelight.devices.pool import SlabPool
from safelight.logs import Log
from safelight.memory.lease import Lease, PendingRead, ResidentSegment
from safelight.memory.plan import Piece, Plan, Resident
from safelight.memory.segments import Segment, has_overlays
from safelight.memory.source import Checksums, SegmentBuffer
from safelight.weights.overlay import OverlaidComponent

_log = Log(__name__)


@dataclass(frozen=True, slots=True)
class ComponentUsage:
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
        return sum(resident.buffer.slab.nbytes for resident in self.residents.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of slabs into which segments are being read now."""
        return sum(pending.buffer.slab.nbytes for pending in self.pending.values())

    def usage_by_component(self) -> list[ComponentUsage]:
        """Return the resident bytes of each component, and its bytes altogether. A family may need fewer."""
        keys = dict.fromkeys(piece.component_key for piece in self.residents)
        found: list[ComponentUsage] = []
        for key in keys:
            segments = [segment for piece, segment in self.residents.items() if piece.component_key == key]
            nbytes = sum(segment.buffer.slab.nbytes for segment in segments)
            leases = max(segment.lease_count for segment in segments)
            found.append(ComponentUsage(key, nbytes, self._totals[key], leases))
        return found

    def planner_view(self, lease: Lease | None, *, pending_as_held: bool) -> tuple[Resident, ...]:
        """Return all resident and pending segments, as the planner sees them for ``lease``.

        ``pending_as_held``: treat segments that are being read as held (True), or as evictable residents (False).
        """
        own = {} if lease is None else lease.residents
        residents = [
            Resident(piece, resident.last_used, resident.lease_count > (own.get(piece.index) is resident))
            for piece, resident in self.residents.items()
        ]
        return (*residents, *(Resident(piece, self._clock, pending_as_held) for piece in self.pending))

    def events_to_wait_for(self, lease: Lease) -> list[threading.Event]:
        """Return the events that are set when the current reads, and the other leases' prefetches, are over."""
        reads = [pending.finished for pending in self.pending.values()]
        return reads + [finished for prefetch, finished in self.prefetches.items() if prefetch is not lease]

    # What a lease does to the table, from its plan to its end.

    def adopt(self, lease: Lease, new_plan: Plan) -> None:
        """Store the lease's new plan and, for reports, the total bytes of each component key.

        An underlying component counts all its segments. A component with overlays counts only the segments that the
        overlays change.
        """
        lease.plan = self.last_plan = new_plan
        total = sum(segment.nbytes for segment in lease.segments)
        for key in {piece.component_key for piece in lease.pieces}:
            is_underlying = isinstance(lease.component, OverlaidComponent) and not has_overlays(key)
            own = sum(piece.nbytes for piece in lease.pieces if piece.component_key == key)
            self._totals[key] = total if is_underlying else own

    @staticmethod
    def hold(lease: Lease, resident: ResidentSegment) -> None:
        """Let a lease hold a resident segment."""
        if resident.buffer.segment.piece.index not in lease.residents:
            resident.lease_count += 1
            lease.residents[resident.buffer.segment.piece.index] = resident

    @staticmethod
    def stop_holding(lease: Lease, indices: Collection[int]) -> None:
        """Let a lease, which streams these segments from now on, no longer hold them. They stay in memory."""
        for index in indices:
            resident = lease.residents.pop(index)
            resident.lease_count -= 1

    def begin_reads(self, lease: Lease, missing: Sequence[Segment]) -> None:
        """Take slabs for the segments that the lease will read. They are pending from now on."""
        for segment in missing:
            buffer = SegmentBuffer.of(segment, self.pool.take(segment.nbytes, lease.key, segment.label))
            pending = PendingRead(buffer, [lease])
            self.pending[segment.piece] = pending
            lease.pending.append(pending)

    def finish_reads(self, lease: Lease, checksums_by_segment: Sequence[Checksums]) -> None:
        """Make the segments that the lease has read resident. All leases that waited for them hold them."""
        for pending, checksums in zip(lease.pending, checksums_by_segment, strict=True):
            piece = pending.buffer.segment.piece
            resident = ResidentSegment(pending.buffer, checksums, last_used=self._clock, unwanted=pending.unwanted)
            self.residents[piece] = resident
            del self.pending[piece]
            for waiting in pending.waiting:
                self.hold(waiting, resident)
            pending.finished.set()
        lease.pending = []

    def abandon(self, lease: Lease) -> None:
        """Return the slabs of pending segments that the lease did not read."""
        for pending in lease.pending:
            piece = pending.buffer.segment.piece
            if self.pending.get(piece) is pending:
                del self.pending[piece]
                pending.buffer.tensors.clear()
                self.pool.give(pending.buffer.slab)
            pending.finished.set()
        lease.pending = []

    def mark_used(self, lease: Lease) -> None:
        """Make the segments that a lease holds the most recently used ones."""
        self._clock += 1
        for resident in lease.residents.values():
            resident.last_used = self._clock

    def release_all(self, lease: Lease) -> None:
        """End everything that a lease holds, reads or waits for."""
        self.abandon(lease)
        for pending in self.pending.values():
            if lease in pending.waiting:
                pending.waiting.remove(lease)
        for resident in lease.residents.values():
            self.release(resident)
        lease.residents = {}

    def release(self, resident: ResidentSegment) -> None:
        """Remove one hold of a segment. If it is wrong or unwanted and nobody holds it now, evict it."""
        resident.lease_count -= 1
        piece = resident.buffer.segment.piece
        if resident.must_evict and self.residents.get(piece) is resident:
            self.evict(piece)

    # Evicting.

    def evict(self, piece: Piece) -> None:
        """Evict a resident segment."""
        resident = self.residents.pop(piece)
        resident.buffer.tensors.clear()
        if not self.pool.give(resident.buffer.slab):
            what = resident.buffer.segment.label
            _log.warning("a tensor is still referenced after its binding ended; its memory is not reused", what=what)

    def evict_dropped(self, new_plan: Plan) -> None:
        """Evict the pieces that a plan drops, if they are still resident and no lease holds them."""
        for piece in new_plan.pieces("drop"):
            resident = self.residents.get(piece)
            if resident is not None and not resident.lease_count:
                self.evict(piece)

    def evict_corrupted_or_unwanted(self, lease: Lease) -> None:
        """Evict those segments of the lease's component that are wrong or unwanted and that no lease holds.

        A segment that another lease holds stays, and this lease shares it.
        """
        for piece, resident in list(self.residents.items()):
            if resident.must_evict and piece in lease.pieces:
                self.evict(piece)

    def evict_unheld(self, digests: Collection[str] | None) -> None:
        """Evict the segments of the components with ``digests`` (None: all) that no lease holds.

        Segments that are being read are evicted as soon as no lease holds them.
        """
        for piece, resident in list(self.residents.items()):
            if not resident.lease_count and piece.is_of(digests):
                self.evict(piece)
        for piece, pending in self.pending.items():
            pending.unwanted |= piece.is_of(digests)
