"""Tracks the segments that are resident in one place and the leases that hold them.

A lease gets a component and holds it in one step. Leased segments are never evicted. Room is made before bytes are
read, so memory use never exceeds the budget. Segments that do not fit are streamed (:mod:`safelight.memory.ring`).

Decisions are made under the lock. Bytes are read without it:

1. Under the lock, a lease takes a slab for the segment. The segment is now *coming*: it counts as resident and is not
   evicted.
2. Without the lock, the lease reads the segment.
3. Under the lock, the segment becomes resident. Its reader and all leases that waited for it hold it. If reading
   failed, the slab is returned, and the waiting leases plan again.

A lease reads its own coming segments before it waits for those of others, so that leases never wait in a circle.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
import torch

from safelight.devices import host
from safelight.devices.base import Device
from safelight.devices.failures import translated
from safelight.devices.pool import SlabPool
from safelight.errors import OutOfMemoryError
from safelight.memory.account import Account
from safelight.memory.budget import Ledger
from safelight.memory.lease import ONCE, Coming, Held, Lease, Use
from safelight.memory.plan import Piece, Plan, Refusal, Resident, Situation, plan
from safelight.memory.refusal import too_large
from safelight.memory.ring import Ring
from safelight.memory.segments import Segment, cut
from safelight.memory.source import Source, Target
from safelight.weights.manifest import ComponentManifest

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """A report line: ``nbytes`` of a component's ``total`` bytes are resident, and ``leases`` leases hold it."""

    component: str
    nbytes: int
    total: int
    leases: int


@dataclass
class Residency:
    """The segments that are resident on ``device``, within the ledger's budget for ``place``.

    ``source``: fetches the segments.
    ``partial``: whether a component may be resident in part (``enable_partial_loading``).
    ``most``: bytes that weights may use (``max_cache_ram_gb``, ``max_cache_vram_gb``), None for the whole budget.
    ``before_planning``: called before each plan; sets the ledger's budget to what the machine allows now.
    ``log``: log each step of each plan.

    Thread-safe. One thread reads a segment, and only leases that need the segment wait for it.
    """

    device: Device
    ledger: Ledger
    place: str
    source: Source
    partial: bool = True
    most: int | None = None
    before_planning: Callable[[], None] = lambda: None
    log: bool = False
    pool: SlabPool = field(init=False)
    _residents: dict[Piece, Held] = field(init=False, default_factory=dict[Piece, Held])
    _coming: dict[Piece, Coming] = field(init=False, default_factory=dict[Piece, Coming])
    _favours: dict[Lease, threading.Event] = field(init=False, default_factory=dict[Lease, threading.Event])
    _pressed: int = field(init=False, default=0)
    _totals: dict[str, int] = field(init=False, default_factory=dict[str, int])
    _last: Plan = field(init=False, default=Plan(()))
    _clock: int = field(init=False, default=0)
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.pool = SlabPool(self.device, Account(self.ledger, self.place, self.most))

    @property
    def resident_bytes(self) -> int:
        """Bytes of slabs that hold resident segments, without ring slots."""
        with self._lock:
            return sum(held.target.slab.nbytes for held in self._residents.values())

    @property
    def coming_bytes(self) -> int:
        """Bytes of slabs into which segments are being read now."""
        with self._lock:
            return sum(coming.target.slab.nbytes for coming in self._coming.values())

    @property
    def pressed(self) -> bool:
        """Whether a lease waits for room, here or in the source. Prefetches then stop."""
        return self._pressed > 0 or self.source.pressed

    def holdings(self) -> list[Holding]:
        """Return the resident bytes of each component."""
        with self._lock:
            keys = dict.fromkeys(piece.component for piece in self._residents)
            found: list[Holding] = []
            for key in keys:
                held = [h for piece, h in self._residents.items() if piece.component == key]
                nbytes, leases = sum(h.target.slab.nbytes for h in held), max(h.leases for h in held)
                found.append(Holding(key, nbytes, self._totals[key], leases))
            return found

    def last_plan(self) -> list[dict[str, Any]]:
        """Return the steps of the last plan that was carried out."""
        return self._last.described()

    @contextlib.contextmanager
    def lease(
        self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE, favour: bool = False
    ) -> Generator[Lease]:
        """Hold the component in ``dtype`` until the context ends.

        ``favour``: this is a prefetch (:mod:`safelight.memory.prefetch`). It ends soon. Another lease that finds too
        little room beside it waits for its end.

        Raises OutOfMemoryError if not even its largest segment fits beside the segments that other leases hold.
        Raises IntegrityError if its bytes are wrong.
        After an error, this lease holds nothing, and no segment is half read.
        """
        lease = Lease(component, dtype, use, self)
        with contextlib.ExitStack() as stack:
            lease.fetch = stack.enter_context(self.source.opened(component, dtype, favour))
            stack.callback(self._end, lease)
            if favour:
                with self._lock:
                    self._favours[lease] = threading.Event()
            with translated(f"Memory for the {component.role}"):
                self._carry_out(lease, lambda: self._plan_new(lease))
            yield lease

    def least(self, component: ComponentManifest, dtype: torch.dtype) -> int:
        """Return the smallest number of bytes of weights with which a component can run, however slowly."""
        pieces = [segment.nbytes for segment in cut(component, dtype)]
        whole = sum(pieces)
        return min(whole, (self.device.ahead + 1) * max(pieces)) if self.partial else whole

    def planned(self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE) -> Plan | Refusal:
        """Plan a lease without carrying out the plan."""
        with self._lock:
            self.before_planning()
            return plan(self._situation(Lease(component, dtype, use, self), False))

    def refused(self, component: ComponentManifest, dtype: torch.dtype, use: Use, refusal: Refusal) -> OutOfMemoryError:
        """Return the error that a lease would raise for ``refusal``."""
        return self._refused(Lease(component, dtype, use, self), refusal)

    def adjust(self, lease: Lease) -> None:
        """See :meth:`Lease.adjust`."""
        assert lease.fetch is not None
        self.source.follow(lease.fetch)
        before = set(lease.residents)
        with self._lock:
            new = self._plan_running(lease)
            if new is not None and new.staying == before:
                self._drop_all(new)
                self.make_room(0)
                return
        after = "decided after other reads" if new is None else len(new.staying)
        _log.info("memory changed", place=self.place, before=len(before), after=after, of=len(lease.segments))
        self._carry_out(lease, lambda: self._plan_running(lease))
        with self._lock:
            self._notify(lease, lease.residents.keys() - before, True)

    def follow(self) -> None:
        """Adapt to the current budget: if it shrank, evict segments that no lease holds. Call it between two uses."""
        with self._lock:
            self.before_planning()
            outcome = plan(Situation(self._for_weights(None), self._resident_pieces(None, True), ()))
            if isinstance(outcome, Plan):
                self._drop_all(outcome)
            self.make_room(0)

    def _drop_all(self, new_plan: Plan) -> None:
        """Evict the pieces that a plan drops, if they are still resident and no lease holds them."""
        for piece in new_plan.pieces("drop"):
            held = self._residents.get(piece)
            if held is not None and not held.leases:
                self._evict(piece)

    def _start_streaming(self, lease: Lease, indices: Collection[int]) -> None:
        self._notify(lease, indices, False)
        for index in indices:
            held = lease.residents.pop(index)
            held.leases -= 1

    @staticmethod
    def _notify(lease: Lease, indices: Collection[int], resident: bool) -> None:
        if lease.on_change is not None and indices:
            lease.on_change([t.name for i in sorted(indices) for t in lease.segments[i].tensors], resident)

    def seal(self) -> None:
        """Make the resident host segments read-only in the kernel, for this process and the processes it forks."""
        with self._lock:
            for held in self._residents.values():
                if not held.target.slab.sealed:
                    host.make_unwritable(held.target.slab.base)
                    held.target.slab.sealed = True

    def check(self, digests: Collection[str] | None = None) -> list[str]:
        """Verify the resident segments of the components with ``digests`` (None: all). Return the labels of wrong ones.

        Wrong segments are evicted as soon as no lease holds them.
        """
        with self._lock:
            checked = [held for piece, held in self._residents.items() if piece.is_of(digests)]
            for held in checked:
                held.leases += 1
        wrong: list[Held] = []
        try:
            wrong += [held for held in checked if not held.intact(self.source)]
        finally:
            with self._lock:
                for held in wrong:
                    held.spoiled = True
                for held in checked:
                    self._release(held)
        return [held.target.segment.label for held in wrong]

    def drop(self, digest: str | None = None) -> None:
        """Evict the segments of the component with ``digest`` (None: all components) that no lease holds.

        Segments that are being read are evicted as soon as no lease holds them. With None, cached slabs are freed too.
        """
        with self._lock:
            digests = None if digest is None else (digest,)
            for piece, held in list(self._residents.items()):
                if not held.leases and piece.is_of(digests):
                    self._evict(piece)
            for piece, coming in self._coming.items():
                coming.unwanted |= piece.is_of(digests)
            if digest is None:
                self.pool.trim(0)
            else:
                self.make_room(0)

    def make_room(self, promise: int) -> None:
        """Free cached slabs until the budget has room for ``promise`` more bytes, or no cached slab is left."""
        self.pool.trim(max(0, self.pool.kept_bytes + min(0, self.ledger.free(self.place) - promise)))

    def _plan_running(self, lease: Lease) -> Plan | None:
        """Plan again for a lease that runs. If the budget is below the least that works, the plan exceeds it.

        None: the lease would lose pieces to segments that are being read now and soon released, so it must wait.
        """
        self.before_planning()
        situation = self._situation(lease, True)
        outcome = plan(situation)
        loses = isinstance(outcome, Refusal) or not outcome.staying.issuperset(lease.residents)
        if loses and self._coming:
            return None
        if isinstance(outcome, Refusal):
            lacking = outcome.least - outcome.available
            if self.most is not None:
                # The settings' limit must hold. The lease's current plan respects it.
                return lease.plan
            self.ledger.set_budget(self.place, self.ledger.budget(self.place) + lacking)
            outcome = plan(replace(situation, budget=situation.budget + lacking))
        if isinstance(outcome, Refusal):
            raise self._refused(lease, outcome)
        return outcome

    def _plan_new(self, lease: Lease) -> Plan | None:
        """Plan a new lease. None: too little room beside segments that are soon released, so it must wait."""
        self._forget_spoiled(lease)
        self.before_planning()
        outcome = plan(self._situation(lease, True))
        temporary = self._coming or (self._favours and lease not in self._favours)
        if temporary and (isinstance(outcome, Refusal) or outcome.slots):
            return None
        if isinstance(outcome, Refusal):
            # Tensors may be free by now, or only held by a reference cycle, such as an error and its frames.
            self.pool.collect()
            self.pool.trim()
            outcome = plan(self._situation(lease, True))
        if isinstance(outcome, Refusal):
            raise self._refused(lease, outcome)
        return outcome

    def _situation(self, lease: Lease, reading: bool) -> Situation:
        """``reading``: whether segments that are being read count as held. False: as if they were read already."""
        return Situation(
            budget=self._for_weights(lease),
            residents=self._resident_pieces(lease, reading),
            needed=tuple(segment.piece for segment in lease.segments),
            passes=lease.use.passes,
            upcoming=lease.use.upcoming,
            partial=self.partial,
            ahead=self.device.ahead,
        )

    def _resident_pieces(self, lease: Lease | None, reading: bool) -> tuple[Resident, ...]:
        """Return all resident and coming segments, as the planner sees them for ``lease``."""
        own = {} if lease is None else lease.residents
        residents = [
            Resident(piece, held.used, held.leases > (own.get(piece.index) is held))
            for piece, held in self._residents.items()
        ]
        return (*residents, *(Resident(piece, self._clock, reading) for piece in self._coming))

    def _for_weights(self, lease: Lease | None) -> int:
        """Return the bytes for resident segments and the lease's ring.

        That is the budget minus the bytes promised to computing, at most what the settings allow, minus other storage.
        """
        ring = lease.ring.nbytes if lease is not None and lease.ring is not None else 0
        others = self.ledger.stored(self.place) - self.resident_bytes - self.coming_bytes - self.pool.kept_bytes - ring
        promised = self.ledger.reserved(self.place)
        if lease is not None and lease.reserved is None:
            promised += lease.use.working
        # Once they are leased, the components beside it hold their bytes themselves.
        others += lease.use.leave if lease is not None and not lease.begun else 0
        allowed = self.ledger.budget(self.place) - promised
        return (allowed if self.most is None else min(allowed, self.most)) - others

    def _refused(self, lease: Lease, refusal: Refusal) -> OutOfMemoryError:
        return too_large(lease, refusal, self.place, self.ledger.budget(self.place), self.most, self.partial)

    def _carry_out(self, lease: Lease, decide: Callable[[], Plan | None]) -> None:
        """Carry out the plan that ``decide`` returns, until all its pieces are resident.

        ``decide`` is called under the lock. It is called again if it returned None, after the current reads and
        prefetches end; and if another lease failed to read a segment that this plan needs.
        """
        try:
            while not self._attempt(lease, decide):
                pass
        except BaseException:
            with self._lock:
                self._abandon(lease)
            raise

    def _attempt(self, lease: Lease, decide: Callable[[], Plan | None]) -> bool:
        presses = False
        try:
            with self._lock:
                new_plan = decide()
                if new_plan is None:
                    presses, awaited = True, [coming.over for coming in self._coming.values()]
                    awaited += [over for favour, over in self._favours.items() if favour is not lease]
                    self._pressed += 1
                else:
                    awaited = [coming.over for coming in self._reserve(lease, new_plan)]
            self._read(lease)
            for over in awaited:
                over.wait()
        finally:
            if presses:
                with self._lock:
                    self._pressed -= 1
        with self._lock:
            if new_plan is None or not new_plan.staying <= lease.residents.keys():
                return False
            self._clock += 1
            for held in lease.residents.values():
                held.used = self._clock
            return True

    def _reserve(self, lease: Lease, new_plan: Plan) -> list[Coming]:
        """Do all steps of a plan except reading: evict, hold resident pieces, take slabs, reserve working memory.

        Returns the segments that other leases are reading and this one needs. The caller has the lock.
        """
        lease.plan = self._last = new_plan
        self._note_totals(lease)
        if self.log:
            for step in new_plan.steps:
                _log.info("memory", place=self.place, action=step.action, piece=step.piece, reason=step.reason)
        if lease.ring is not None:
            lease.ring.close()
            lease.ring = None
        self._start_streaming(lease, lease.residents.keys() - new_plan.staying)
        self._drop_all(new_plan)
        awaited: list[Coming] = []
        for piece in new_plan.pieces("keep"):
            if piece in self._coming:
                self._coming[piece].waiting.append(lease)
                awaited.append(self._coming[piece])
            else:
                self._hold(lease, self._residents[piece])
        self._expect(lease, [lease.segments[piece.index] for piece in new_plan.pieces("load")])
        streamed = [lease.segments[piece.index] for piece in new_plan.pieces("stream")]
        if streamed:
            assert lease.fetch is not None
            ahead = new_plan.slots - 1
            lease.ring = Ring(self.pool, lease.fetch, streamed, new_plan.slots, ahead, lease.use.passes, lease.key)
        promise = lease.use.working if lease.reserved is None else 0
        self.make_room(promise)
        if promise:
            lease.reserved = self.ledger.charge(self.place, lease.use.working, lease.key, "computing", stored=False)
        lease.begun = True
        return awaited

    def _note_totals(self, lease: Lease) -> None:
        total = sum(segment.nbytes for segment in lease.segments)
        self._totals |= {piece.component: total for piece in lease.pieces}
        self._totals[lease.key] = sum(piece.nbytes for piece in lease.pieces if piece.component == lease.key)

    @staticmethod
    def _hold(lease: Lease, held: Held) -> None:
        if held.target.segment.piece.index not in lease.residents:
            held.leases += 1
            lease.residents[held.target.segment.piece.index] = held

    def _expect(self, lease: Lease, missing: list[Segment]) -> None:
        """Take slabs for the segments that the lease will read. The caller has the lock."""
        for segment in missing:
            target = Target.of(segment, self.pool.take(segment.nbytes, lease.key, segment.label))
            coming = Coming(target, [lease])
            self._coming[segment.piece] = coming
            lease.coming.append(coming)

    def _read(self, lease: Lease) -> None:
        """Read the lease's coming segments without the lock. Then all leases that waited for them hold them."""
        if not lease.coming:
            return
        assert lease.fetch is not None
        proofs = lease.fetch([coming.target for coming in lease.coming])
        with self._lock:
            for coming, proof in zip(lease.coming, proofs, strict=True):
                piece = coming.target.segment.piece
                held = Held(coming.target, proof, used=self._clock, unwanted=coming.unwanted)
                self._residents[piece] = held
                del self._coming[piece]
                for waiting in coming.waiting:
                    self._hold(waiting, held)
                coming.over.set()
            lease.coming = []

    def _abandon(self, lease: Lease) -> None:
        """Return the slabs of coming segments that the lease did not read. The caller has the lock."""
        for coming in lease.coming:
            piece = coming.target.segment.piece
            if self._coming.get(piece) is coming:
                del self._coming[piece]
                coming.target.tensors.clear()
                self.pool.give(coming.target.slab)
            coming.over.set()
        lease.coming = []

    def _forget_spoiled(self, lease: Lease) -> None:
        """Evict segments that are known to be wrong or unwanted, so that a new lease does not use them."""
        for piece, held in list(self._residents.items()):
            if held.passing and piece in lease.pieces:
                self._evict(piece)

    def _end(self, lease: Lease) -> None:
        try:
            if lease.ring is not None:
                lease.ring.close()
        finally:
            with self._lock:
                lease.ring = None
                self._let_go(lease)
                favour = self._favours.pop(lease, None)
                if favour is not None:
                    favour.set()

    def _let_go(self, lease: Lease) -> None:
        self._abandon(lease)
        for coming in self._coming.values():
            if lease in coming.waiting:
                coming.waiting.remove(lease)
        for held in lease.residents.values():
            self._release(held)
        lease.residents = {}
        if lease.reserved is not None:
            self.ledger.credit(lease.reserved)
            lease.reserved = None

    def _release(self, held: Held) -> None:
        held.leases -= 1
        piece = held.target.segment.piece
        if held.passing and self._residents.get(piece) is held:
            self._evict(piece)

    def _evict(self, piece: Piece) -> None:
        held = self._residents.pop(piece)
        held.target.tensors.clear()
        if not self.pool.give(held.target.slab):
            what = held.target.segment.label
            _log.warning("a tensor is still referenced after its binding ended; its memory is not reused", what=what)
