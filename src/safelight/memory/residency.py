"""What is resident in one place, and who holds it.

Getting a component and holding it is one step (a lease); what is leased is never evicted. Room is made before bytes are
read, never after, so that the budget is a bound. What does not fit is streamed (:mod:`safelight.memory.ring`).
"""

from __future__ import annotations

import contextlib
import math
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
from safelight.memory.budget import HOST, Ledger
from safelight.memory.lease import ONCE, Held, Lease, Use
from safelight.memory.plan import Piece, Plan, Refusal, Resident, Situation, plan
from safelight.memory.ring import Ring
from safelight.memory.segments import Segment, cut
from safelight.memory.source import Source, Target
from safelight.weights.manifest import ComponentManifest

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """For people: ``nbytes`` of a component's ``total`` are resident, ``leases`` hold it."""

    component: str
    nbytes: int
    total: int
    leases: int


@dataclass
class Residency:
    """The segments that are resident on ``device``, within the ledger's budget for ``place``.

    ``source`` brings them. ``partial``: whether a component may be resident in part (``enable_partial_loading``).
    ``most``: bytes that weights may take (``max_cache_ram_gb``, ``max_cache_vram_gb``), None for all of the budget.
    ``before_planning``: called before each plan; sets the ledger's budget to what the machine allows now.
    Safe to be used by several threads: loading is serialised.
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
    _totals: dict[str, int] = field(init=False, default_factory=dict[str, int])
    _last: Plan = field(init=False, default=Plan(()))
    _clock: int = field(init=False, default=0)
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.pool = SlabPool(self.device, Account(self.ledger, self.place, self.most))

    @property
    def resident_bytes(self) -> int:
        """Bytes of slabs that hold resident segments; those of rings not counted."""
        with self._lock:
            return sum(held.target.slab.nbytes for held in self._residents.values())

    def holdings(self) -> list[Holding]:
        """What is resident, by component."""
        with self._lock:
            keys = dict.fromkeys(piece.component for piece in self._residents)
            found: list[Holding] = []
            for key in keys:
                held = [h for piece, h in self._residents.items() if piece.component == key]
                nbytes, leases = sum(h.target.slab.nbytes for h in held), max(h.leases for h in held)
                found.append(Holding(key, nbytes, self._totals[key], leases))
            return found

    def last_plan(self) -> list[dict[str, Any]]:
        """The steps of the last plan that was carried out: action, segment, bytes, reason."""
        return [
            {
                "action": step.action,
                "segment": f"{step.piece.component} {step.piece.index}",
                "nbytes": step.piece.nbytes,
                "reason": step.reason,
            }
            for step in self._last.steps
        ]

    @contextlib.contextmanager
    def lease(self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE) -> Generator[Lease]:
        """The component in ``dtype``, held until the context ends.

        Raises OutOfMemoryError when not even its largest segment fits beside what others hold, IntegrityError when its
        bytes are wrong. Nothing stays held or half read then.
        """
        lease = Lease(component, dtype, use, self)
        with contextlib.ExitStack() as stack:
            lease.fetch = stack.enter_context(self.source.opened(component, dtype))
            with self._lock, translated(f"Memory for the {component.role}"):
                stack.callback(self._end, lease)
                self._forget_spoiled(lease)
                self._carry_out(lease, self._planned(lease))
            yield lease

    def least(self, component: ComponentManifest, dtype: torch.dtype) -> int:
        """Bytes of weights without which a component cannot be used at all, however slowly."""
        pieces = [segment.nbytes for segment in cut(component, dtype)]
        whole = sum(pieces)
        return min(whole, (self.device.ahead + 1) * max(pieces)) if self.partial else whole

    def planned(self, component: ComponentManifest, dtype: torch.dtype, use: Use = ONCE) -> Plan | Refusal:
        """What a lease would do now, without doing it."""
        with self._lock:
            self.before_planning()
            return plan(self._situation(Lease(component, dtype, use, self)))

    def refused(self, component: ComponentManifest, dtype: torch.dtype, use: Use, refusal: Refusal) -> OutOfMemoryError:
        """What a lease would raise for that refusal."""
        return self._refused(Lease(component, dtype, use, self), refusal)

    def adjust(self, lease: Lease) -> None:
        """See :meth:`Lease.adjust`."""
        with self._lock:
            self.source.follow()
            before = set(lease.residents)
            new = self._least(lease)
            after = {piece.index for piece in (*new.pieces("keep"), *new.pieces("load"))}
            if after == before:
                for piece in new.pieces("drop"):
                    self._evict(piece)
                self.make_room(0)
                return
            _log.info("memory changed", place=self.place, before=len(before), after=len(after), of=len(lease.segments))
            if lease.ring is not None:
                lease.ring.close()
                lease.ring = None
            self._streamed_from_now_on(lease, before - after)
            self._carry_out(lease, new)
            self._told(lease, after - before, True)

    def follow(self) -> None:
        """Between two uses: follow the budget, which may have shrunk; what nobody holds goes first."""
        with self._lock:
            self.before_planning()
            residents = tuple(Resident(piece, held.used, held.leases > 0) for piece, held in self._residents.items())
            decided = plan(Situation(self._for_weights(None), residents, ()))
            if isinstance(decided, Plan):
                for piece in decided.pieces("drop"):
                    self._evict(piece)
            self.make_room(0)

    def _streamed_from_now_on(self, lease: Lease, indices: set[int]) -> None:
        self._told(lease, indices, False)
        for index in indices:
            held = lease.residents.pop(index)
            held.leases -= 1

    @staticmethod
    def _told(lease: Lease, indices: set[int], resident: bool) -> None:
        if lease.on_change is not None and indices:
            lease.on_change([t.name for i in sorted(indices) for t in lease.segments[i].tensors], resident)

    def seal(self) -> None:
        """Make what is resident on the host unwritable, by the kernel, for this process and those it forks."""
        with self._lock:
            for held in self._residents.values():
                if not held.target.slab.sealed:
                    host.make_unwritable(held.target.slab.base)
                    held.target.slab.sealed = True

    def check(self, digests: Collection[str] | None = None) -> list[str]:
        """Prove what is resident again, of the components of those digests or of all: the labels of segments whose
        bytes are not those that were produced. They are dropped as soon as nobody holds them."""
        marks = None if digests is None else [f" {digest[:16]} " for digest in digests]
        with self._lock:
            wrong: list[str] = []
            for piece, held in list(self._residents.items()):
                meant = marks is None or any(mark in piece.component for mark in marks)
                if meant and not held.intact(self.source):
                    held.spoiled = True
                    wrong.append(held.target.segment.label)
                    if not held.leases:
                        self._evict(piece)
            return wrong

    def drop(self, digest: str | None = None) -> None:
        """Drop what nobody holds: the components of that digest, or all. Kept slabs go with the last."""
        with self._lock:
            for piece, held in list(self._residents.items()):
                if not held.leases and (digest is None or f" {digest[:16]} " in piece.component):
                    self._evict(piece)
            if digest is None:
                self.pool.trim(0)
            else:
                self.make_room(0)

    def make_room(self, promise: int) -> None:
        """Give kept slabs back as far as the budget is passed, or ``promise`` bytes more would pass it."""
        self.pool.trim(max(0, self.pool.kept_bytes + min(0, self.ledger.free(self.place) - promise)))

    def _least(self, lease: Lease) -> Plan:
        """A plan by the budget, or with the least that works when the budget is below it: what runs goes on."""
        self.before_planning()
        situation = self._situation(lease)
        decided = plan(situation)
        if isinstance(decided, Refusal):
            lacking = decided.least - decided.available
            if self.most is not None:
                # The settings' limit holds; what was possible at the beginning still is.
                return lease.plan
            self.ledger.set_budget(self.place, self.ledger.budget(self.place) + lacking)
            decided = plan(replace(situation, budget=situation.budget + lacking))
        if isinstance(decided, Refusal):
            raise self._refused(lease, decided)
        return decided

    def _planned(self, lease: Lease) -> Plan:
        self.before_planning()
        decided = plan(self._situation(lease))
        if isinstance(decided, Refusal):
            # What somebody held may be free by now, or held by nothing but a circle: an error and its frames.
            self.pool.collect()
            self.pool.trim()
            decided = plan(self._situation(lease))
        if isinstance(decided, Refusal):
            raise self._refused(lease, decided)
        return decided

    def _situation(self, lease: Lease) -> Situation:
        residents = tuple(
            Resident(piece, held.used, held.leases > (lease.residents.get(piece.index) is held))
            for piece, held in self._residents.items()
        )
        return Situation(
            budget=self._for_weights(lease),
            residents=residents,
            needed=tuple(segment.piece for segment in lease.segments),
            passes=lease.use.passes,
            upcoming=lease.use.upcoming,
            partial=self.partial,
            ahead=self.device.ahead,
        )

    def _for_weights(self, lease: Lease | None) -> int:
        """Bytes for resident segments and the lease's ring: the budget less what is promised to computing, or what the
        settings allow, less what is stored but is neither."""
        ring = lease.ring.nbytes if lease is not None and lease.ring is not None else 0
        others = self.ledger.stored(self.place) - self.resident_bytes - self.pool.kept_bytes - ring
        promised = self.ledger.reserved(self.place)
        if lease is not None and lease.reserved is None:
            promised += lease.use.working
        # What is leased beside it holds its part by itself, once it is.
        others += lease.use.leave if lease is not None and not lease.begun else 0
        allowed = self.ledger.budget(self.place) - promised
        return (allowed if self.most is None else min(allowed, self.most)) - others

    def _refused(self, lease: Lease, refusal: Refusal) -> OutOfMemoryError:
        setting = "max_cache_ram_gb" if self.place == HOST else "max_cache_vram_gb"
        budget, working, lacking = self.ledger.budget(self.place), lease.use.working, refusal.least - refusal.available
        if self.most is not None and self.most < budget - working:
            hint = f"{setting} is {_gb(self.most)}; the least with which this works is {_gb(self.most + lacking)}"
        else:
            hint = (
                f"This process can have {_gb(budget)} GB, {_gb(working)} GB of it for computing; "
                f"the least with which this works is {_gb(budget + lacking)} GB"
            )
        hint += f", as {refusal.reason}."
        if not self.partial:
            hint += " enable_partial_loading: true needs less."
        role = lease.component.role.replace("_", " ")
        return OutOfMemoryError(f"The {role}", refusal.least, max(0, refusal.available), hint, final=True)

    def _carry_out(self, lease: Lease, decided: Plan) -> None:
        """Drop, promise, make room, read; or leave everything as it was but for what was dropped."""
        lease.plan = self._last = decided
        total = sum(segment.nbytes for segment in lease.segments)
        self._totals |= {piece.component: total for piece in lease.pieces}
        self._totals[lease.key] = sum(piece.nbytes for piece in lease.pieces if piece.component == lease.key)
        if self.log:
            for step in decided.steps:
                _log.info("memory", place=self.place, action=step.action, piece=step.piece, reason=step.reason)
        for piece in decided.pieces("drop"):
            self._evict(piece)
        for piece in decided.pieces("keep"):
            self._hold(lease, self._residents[piece])
        missing = [lease.segments[piece.index] for piece in decided.pieces("load")]
        if missing:
            for held in self._brought(lease, missing):
                self._residents[held.target.segment.piece] = held
                self._hold(lease, held)
        streamed = [lease.segments[piece.index] for piece in decided.pieces("stream")]
        if streamed:
            assert lease.fetch is not None
            ahead = decided.slots - 1
            lease.ring = Ring(self.pool, lease.fetch, streamed, decided.slots, ahead, lease.use.passes, lease.key)
        promise = lease.use.working if lease.reserved is None else 0
        self.make_room(promise)
        if promise:
            lease.reserved = self.ledger.charge(self.place, lease.use.working, lease.key, "computing", stored=False)
        lease.begun = True
        self._clock += 1
        for held in lease.residents.values():
            held.used = self._clock

    @staticmethod
    def _hold(lease: Lease, held: Held) -> None:
        if held.target.segment.piece.index not in lease.residents:
            held.leases += 1
            lease.residents[held.target.segment.piece.index] = held

    def _brought(self, lease: Lease, missing: list[Segment]) -> list[Held]:
        assert lease.fetch is not None
        targets: list[Target] = []
        try:
            for segment in missing:
                slab = self.pool.take(segment.nbytes, lease.key, segment.label)
                targets.append(Target.of(segment, slab))
            proofs = lease.fetch(targets)
        except BaseException:
            for target in targets:
                target.tensors.clear()
                self.pool.give(target.slab)
            raise
        return [Held(target, proof) for target, proof in zip(targets, proofs, strict=True)]

    def _forget_spoiled(self, lease: Lease) -> None:
        """What is known to be wrong is not kept for the next lease."""
        for piece, held in list(self._residents.items()):
            if held.spoiled and not held.leases and piece in lease.pieces:
                self._evict(piece)

    def _end(self, lease: Lease) -> None:
        with self._lock:
            try:
                if lease.ring is not None:
                    lease.ring.close()
            finally:
                lease.ring = None
                self._let_go(lease)

    def _let_go(self, lease: Lease) -> None:
        for held in lease.residents.values():
            held.leases -= 1
            if held.spoiled and not held.leases and self._residents.get(held.target.segment.piece) is held:
                self._evict(held.target.segment.piece)
        lease.residents = {}
        if lease.reserved is not None:
            self.ledger.credit(lease.reserved)
            lease.reserved = None

    def _evict(self, piece: Piece) -> None:
        held = self._residents.pop(piece)
        held.target.tensors.clear()
        if not self.pool.give(held.target.slab):
            what = held.target.segment.label
            _log.warning("a tensor outlived its binding; its memory is not used again", what=what)


def _gb(nbytes: int) -> str:
    """Gigabytes (2^30 bytes) for people, rounded up."""
    return f"{math.ceil(nbytes / 2**30 * 10000) / 10000:.4f}"
