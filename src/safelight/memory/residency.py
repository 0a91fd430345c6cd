"""Tracks the segments that are resident in one place and the leases that hold them.

The residency owns the lock. Its :class:`SegmentTable` says what is in memory and who holds it; its :class:`Planner`
decides what is to be in memory; the residency itself carries that out.

A lease gets a component and holds it in one step. Leased segments are never evicted. Room is made before bytes are
read, so memory use never exceeds the budget. Segments that do not fit are streamed (:mod:`safelight.memory.ring`).

Decisions are made under the lock. Bytes are read without it:

1. Under the lock, a lease takes a slab for the segment. The segment is now *pending*: it counts as resident and is not
   evicted.
2. Without the lock, the lease reads the segment.
3. Under the lock, the segment becomes resident. Its reader and all leases that waited for it hold it. If reading
   failed, the slab is returned, and the waiting leases plan again.

A lease reads its own pending segments before it waits for those of others, so that leases never wait in a circle.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator
from typing import Any

import torch

from safelight.devices import host
from safelight.devices.base import Device
from safelight.devices.failures import translate_torch_errors
from safelight.devices.pool import SlabPool
from safelight.logs import Log
from safelight.memory.account import LedgerRecorder
from safelight.memory.budget import Ledger
from safelight.memory.lease import ONCE, Lease, PendingRead, ResidentSegment, Use
from safelight.memory.plan import Piece, Plan, Refusal
from safelight.memory.planner import Planner
from safelight.memory.ring import Ring
from safelight.memory.segment_table import ComponentUsage, SegmentTable
from safelight.memory.source import Source
from safelight.weights.manifest import ComponentManifest

_log = Log(__name__)


class Residency:
    """The segments that are resident on ``device``, within the ledger's budget for ``place``.

    ``source``: fetches the segments.
    ``partial``: whether a component may be resident in part (``enable_partial_loading``).
    ``max_bytes``: upper limit for weights (``max_cache_ram_gb``, ``max_cache_vram_gb``); None for the whole budget.
    ``before_planning``: called before each plan; sets the ledger's budget to what the machine allows now.
    ``log``: log each step of each plan.

    Thread-safe. One thread reads a segment, and only leases that need the segment wait for it.

    ``lock`` guards ``table`` and the methods of ``planner`` that plan. Hold it when you use them.
    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        place: str,
        source: Source,
        partial: bool = True,
        max_bytes: int | None = None,
        before_planning: Callable[[], None] = lambda: None,
        log: bool = False,
    ) -> None:
        self.device = device
        self.ledger = ledger
        self.place = place
        self.source = source
        self.pool = SlabPool(device, LedgerRecorder(ledger, place, max_bytes))
        self.lock = threading.RLock()
        self.table = SegmentTable(self.pool)
        self.planner = Planner(self.table, device, ledger, place, partial, max_bytes, before_planning)
        self._log_plans = log
        self._waiting_leases = 0

    @property
    def resident_bytes(self) -> int:
        """See :attr:`SegmentTable.resident_bytes`."""
        with self.lock:
            return self.table.resident_bytes

    @property
    def pending_bytes(self) -> int:
        """See :attr:`SegmentTable.pending_bytes`."""
        with self.lock:
            return self.table.pending_bytes

    @property
    def has_waiting_lease(self) -> bool:
        """Whether a lease waits for room, here or in the source. Prefetches then stop."""
        return self._waiting_leases > 0 or self.source.has_waiting_lease

    def usage_by_component(self) -> list[ComponentUsage]:
        """Return the resident bytes of each component."""
        with self.lock:
            return self.table.usage_by_component()

    def are_resident(self, pieces: Collection[Piece]) -> bool:
        """Return whether all of these pieces are in memory."""
        with self.lock:
            return all(piece in self.table.residents for piece in pieces)

    def last_plan(self) -> list[dict[str, Any]]:
        """Return the actions of the last plan that was carried out."""
        return self.table.last_plan.describe()

    @contextlib.contextmanager
    def lease(
        self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE, background: bool = False
    ) -> Generator[Lease]:
        """Hold the component in ``dtype`` until the context ends.

        ``background``: this is a prefetch (:mod:`safelight.memory.prefetch`). A lease that lacks room because of a
        prefetch waits until the prefetch ends.

        Raises OutOfMemoryError if not even its largest segment fits beside the segments that other leases hold.
        Raises IntegrityError if its bytes are wrong.
        After an error, this lease holds nothing, and no segment is half read.
        """
        lease = Lease(component, dtype, use, self)
        with contextlib.ExitStack() as stack:
            lease.fetcher = stack.enter_context(self.source.open(component, dtype, background, use.unread))
            stack.callback(self._end, lease)
            if background:
                with self.lock:
                    self.table.prefetches[lease] = threading.Event()
            with translate_torch_errors(f"Loading the {component.role}"):
                self._carry_out(lease, lambda: self.planner.plan_new(lease))
            yield lease

    def plan_lease(self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE) -> Plan | Refusal:
        """Plan a lease without carrying out the plan."""
        with self.lock:
            return self.planner.plan_dry_run(Lease(component, dtype, use, self))

    def adjust(self, lease: Lease) -> None:
        """See :meth:`Lease.adjust`."""
        assert lease.fetcher is not None
        lease.fetcher.follow_budget()
        before = set(lease.residents)
        with self.lock:
            new = self.planner.plan_running(lease)
            if new is not None and new.staying == before:
                self.table.evict_dropped(new)
                self.trim_cached_slabs(0)
                return
        after = None if new is None else len(new.staying)
        waiting = new is None
        counts = {"before": len(before), "after": after, "of": len(lease.needed)}
        _log.info("memory changed", place=self.place, waiting=waiting, **counts)
        self._carry_out(lease, lambda: self.planner.plan_running(lease))
        with self.lock:
            lease.tell_change(lease.residents.keys() - before, True)

    def shrink_to_budget(self) -> None:
        """If the budget shrank, evict segments that no lease holds. Call it between two uses."""
        with self.lock:
            eviction = self.planner.plan_eviction()
            if eviction is not None:
                self.table.evict_dropped(eviction)
            self.trim_cached_slabs(0)

    def seal(self) -> None:
        """Write-protect the resident host segments in the operating system. Forked processes inherit the protection."""
        with self.lock:
            for resident in self.table.residents.values():
                if not resident.buffer.slab.sealed:
                    host.make_unwritable(resident.buffer.slab.base)
                    resident.buffer.slab.sealed = True

    def check(self, digests: Collection[str] | None = None) -> list[str]:
        """Verify the resident segments of the components with ``digests`` (None: all). Return the labels of wrong ones.

        Wrong segments are evicted as soon as no lease holds them.
        """
        with self.lock:
            checked = [resident for piece, resident in self.table.residents.items() if piece.is_of(digests)]
            for resident in checked:
                resident.lease_count += 1
        wrong: list[ResidentSegment] = []
        try:
            wrong += [resident for resident in checked if not resident.verify(self.source)]
        finally:
            with self.lock:
                for resident in wrong:
                    resident.corrupted = True
                for resident in checked:
                    self.table.release(resident)
        return [resident.buffer.segment.label for resident in wrong]

    def drop(self, digest: str | None = None) -> None:
        """Evict the segments of the component with ``digest`` (None: all components) that no lease holds.

        Segments that are being read are evicted as soon as no lease holds them. With None, cached slabs are freed too.
        """
        with self.lock:
            self.table.evict_unheld(None if digest is None else (digest,))
            if digest is None:
                self.pool.trim(0)
            else:
                self.trim_cached_slabs(0)

    def trim_cached_slabs(self, needed_bytes: int) -> None:
        """Free cached slabs until the budget has room for ``needed_bytes`` more, or no cached slab is left."""
        self.pool.trim(max(0, self.pool.cached_bytes + min(0, self.ledger.free(self.place) - needed_bytes)))

    def read(self, lease: Lease) -> None:
        """Read the lease's pending segments. Then all leases that waited for them hold them.

        The caller does not hold the lock.
        """
        if not lease.pending:
            return
        assert lease.fetcher is not None
        checksums_by_segment = lease.fetcher.fetch([pending.buffer for pending in lease.pending])
        with self.lock:
            self.table.finish_reads(lease, checksums_by_segment)

    def _carry_out(self, lease: Lease, decide: Callable[[], Plan | None]) -> None:
        """Carry out the plan that ``decide`` returns, until all its pieces are resident.

        ``decide`` is called under the lock. It is called again in two cases: it returned None (after the current reads
        and prefetches have ended), or another lease failed to read a segment that this plan needs.
        """
        try:
            while not self._attempt(lease, decide):
                pass
        except BaseException:
            with self.lock:
                self.table.abandon(lease)
            raise

    def _attempt(self, lease: Lease, decide: Callable[[], Plan | None]) -> bool:
        waits = False
        try:
            with self.lock:
                new_plan = decide()
                if new_plan is None:
                    waits, awaited = True, self.table.events_to_wait_for(lease)
                    self._waiting_leases += 1
                else:
                    awaited = [pending.finished for pending in self._apply_plan(lease, new_plan)]
            self.read(lease)
            for finished in awaited:
                finished.wait()
        finally:
            if waits:
                with self.lock:
                    self._waiting_leases -= 1
        with self.lock:
            if new_plan is None or not new_plan.staying <= lease.residents.keys():
                return False
            self.table.mark_used(lease)
            return True

    def _apply_plan(self, lease: Lease, new_plan: Plan) -> list[PendingRead]:
        """Do all actions of a plan except reading: evict, hold resident pieces, take slabs, reserve working memory.

        Returns the segments that other leases are reading and this one needs. The caller has the lock.
        """
        table = self.table
        table.adopt(lease, new_plan)
        if self._log_plans:
            for action in new_plan.actions:
                _log.info("plan", place=self.place, action=action.name, piece=action.piece, reason=action.reason)
        if lease.ring is not None:
            lease.ring.close()
            lease.ring = None
        streaming = lease.residents.keys() - new_plan.staying
        lease.tell_change(streaming, False)
        table.stop_holding(lease, streaming)
        table.evict_dropped(new_plan)
        lease.dequantiser.reserve(lease.use.dequantised_bytes)
        awaited: list[PendingRead] = []
        for piece in new_plan.pieces("keep"):
            if piece in table.pending:
                table.pending[piece].waiting.append(lease)
                awaited.append(table.pending[piece])
            else:
                table.hold(lease, table.residents[piece])
        table.begin_reads(lease, [lease.segments[piece.index] for piece in new_plan.pieces("load")])
        streamed = [lease.segments[piece.index] for piece in new_plan.pieces("stream")]
        if streamed:
            assert lease.fetcher is not None
            fetch, ahead = lease.fetcher.fetch, new_plan.slots - 1
            lease.ring = Ring(self.pool, fetch, streamed, new_plan.slots, ahead, lease.use.forward_passes, lease.key)
        promise = lease.use.working_bytes if lease.reservation_entry is None else 0
        self.trim_cached_slabs(promise)
        if promise:
            lease.reservation_entry = self.ledger.charge(
                self.place, lease.use.working_bytes, lease.key, "computing", stored=False
            )
        lease.has_plan = True
        return awaited

    def _end(self, lease: Lease) -> None:
        try:
            if lease.ring is not None:
                lease.ring.close()
        finally:
            with self.lock:
                lease.ring = None
                lease.dequantiser.close()
                self.table.release_all(lease)
                if lease.reservation_entry is not None:
                    self.ledger.credit(lease.reservation_entry)
                    lease.reservation_entry = None
                ended = self.table.prefetches.pop(lease, None)
                if ended is not None:
                    ended.set()
