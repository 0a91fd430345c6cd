"""A lease: a component that is held, whose segments are resident or streamed, until it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from safelight.devices.base import Device
from safelight.devices.pool import Slab
from safelight.memory.plan import Plan
from safelight.memory.ring import Ring
from safelight.memory.segments import component_key, cut, places
from safelight.memory.source import Fetch, Proof, Source, Target, Unseen
from safelight.weights.manifest import ComponentManifest


@dataclass(eq=False)
class Held:
    """A resident segment. ``proof``: of its bytes as they were produced. ``unwanted``: somebody asked for it to be
    dropped while it could not be; as one that is ``spoiled`` it goes with its last lease."""

    target: Target
    proof: Proof
    leases: int = 0
    used: int = 0
    spoiled: bool = False
    unwanted: bool = False

    @property
    def passing(self) -> bool:
        """Whether it goes as soon as nobody holds it."""
        return not self.leases and (self.spoiled or self.unwanted)

    def intact(self, source: Source) -> bool:
        """Whether its bytes are those that were produced, as far as a proof was taken."""
        wanted = self.proof.proof if isinstance(self.proof, Unseen) else self.proof
        if wanted is not None and source.proof(self.target) != wanted:
            return False
        self.proof = wanted
        return True


@dataclass(eq=False)
class Coming:
    """A segment that is being read: its place is taken, and nobody uses it yet. ``waiting``: the leases that hold it
    from when it is there; the first reads it. ``over``: set when it is there, or will not come."""

    target: Target
    waiting: list[Lease]
    unwanted: bool = False
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Use:
    """How a component will be used. ``passes``: forward passes. ``working``: bytes that computing takes beside the
    weights. ``upcoming``: the components (:func:`component_key`) that will be wanted after it, the soonest first.
    ``leave``: bytes of weights to leave for components that will be leased beside it (:meth:`Residency.least`)."""

    passes: int = 1
    working: int = 0
    upcoming: tuple[str, ...] = ()
    leave: int = 0


ONCE = Use()

OnChange = Callable[[Sequence[str], bool], None]
"""Told of tensors by name: True, they are resident now; False, they are streamed from now on."""


class Keeper(Protocol):
    """What a lease asks of the residency that gave it."""

    @property
    def device(self) -> Device: ...

    @property
    def source(self) -> Source: ...

    def adjust(self, lease: Lease) -> None:
        """See :meth:`Lease.adjust`."""
        ...


class Lease:
    """A component, held until the lease ends. ``plan``: what was decided for it, and why."""

    def __init__(self, component: ComponentManifest, dtype: torch.dtype, use: Use, keeper: Keeper) -> None:
        self.component = component
        self.dtype = dtype
        self.use = use
        self.segments = cut(component, dtype)
        self.pieces = frozenset(segment.piece for segment in self.segments)
        self.plan = Plan(())
        self.residents: dict[int, Held] = {}
        self.coming: list[Coming] = []
        self.ring: Ring | None = None
        self.fetch: Fetch | None = None
        self.reserved: int | None = None
        self.written = False
        self.begun = False
        self.on_change: OnChange | None = None
        self._keeper = keeper
        self._place, self.shapes = places(component, dtype)

    @property
    def key(self) -> str:
        return component_key(self.component, self.dtype)

    @property
    def resident_bytes(self) -> int:
        return sum(held.target.segment.nbytes for held in self.residents.values())

    def resident(self, name: str) -> torch.Tensor | None:
        """The tensor, if it is resident; None if it is streamed."""
        held = self.residents.get(self._place[name])
        return held.target.tensors[name] if held is not None else None

    @contextlib.contextmanager
    def pinned(self, names: Sequence[str]) -> Generator[list[torch.Tensor]]:
        """The tensors of those names, wherever they come from, to be used within the context."""
        streamed = list(dict.fromkeys(self._place[n] for n in names if self._place[n] not in self.residents))
        with contextlib.ExitStack() as stack:
            there = {index: held.target.tensors for index, held in self.residents.items()}
            if streamed:
                assert self.ring is not None
                there |= dict(zip(streamed, stack.enter_context(self.ring.pinned(*streamed)), strict=True))
            yield [there[self._place[name]][name] for name in names]

    @contextlib.contextmanager
    def held(self, index: int) -> Generator[Slab]:
        """The slab of a segment, resident or streamed."""
        held = self.residents.get(index)
        if held is not None:
            yield held.target.slab
            return
        assert self.ring is not None
        with self.ring.held(index) as slab:
            yield slab

    def renew(self, index: int) -> None:
        """Bring a segment again from where it came."""
        held = self.residents.get(index)
        if held is None:
            assert self.ring is not None
            self.ring.forget(index)
            return
        assert self.fetch is not None
        # Until it is there again it is wrong, whatever happens meanwhile.
        held.spoiled = True
        (held.proof,) = self.fetch([held.target])
        held.spoiled = False

    def intact(self, index: int) -> bool:
        """Whether a resident segment is as it was produced; one that is streamed was read just now."""
        held = self.residents.get(index)
        return held is None or held.intact(self._keeper.source)

    @property
    def unseen(self) -> bool:
        """Whether a resident segment was not looked at since it arrived."""
        return any(isinstance(held.proof, Unseen) for held in self.residents.values())

    def adjust(self) -> None:
        """Between two passes: follow the budget, which may have shrunk or grown since; at most down to the least that
        works. Nothing of this component may be in use."""
        self._keeper.adjust(self)

    def address(self, tensor: torch.Tensor) -> int:
        """Where a tensor starts in its memory; only its remainder by the alignment means something."""
        return self._keeper.device.address(tensor)

    def spoil(self, name: str) -> None:
        """Somebody wrote into this tensor: its segment is dropped when its last lease ends."""
        self.written = True
        held = self.residents.get(self._place[name])
        if held is not None:
            held.spoiled = True

    def verify(self) -> list[str]:
        """The labels of resident segments whose bytes are not those that were produced. They are dropped at the end."""
        wrong = [held for held in self.residents.values() if not held.intact(self._keeper.source)]
        for held in wrong:
            held.spoiled = True
        return [held.target.segment.label for held in wrong]
