"""A lease holds a component until it ends. The component's segments are resident or streamed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from safelight.devices.base import Device
from safelight.devices.pool import Slab, SlabPool
from safelight.errors import BindingError
from safelight.memory.dequantiser import Dequantiser
from safelight.memory.plan import Plan
from safelight.memory.ring import Ring
from safelight.memory.segments import component_key, index_tensors, needed_segments, split_into_segments
from safelight.memory.source import Checksums, Fetcher, SegmentBuffer, Source, Unverified
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent


@dataclass(eq=False)
class ResidentSegment:
    """A resident segment.

    ``checksums``: those of its bytes when they were produced.
    ``lease_count``: how many leases hold it.
    ``last_used``: when it was last used: a counter, not a time.
    ``corrupted``: its bytes are wrong. It is evicted when its last lease ends.
    ``unwanted``: somebody asked to evict it while a lease held it. It is evicted when its last lease ends.
    """

    buffer: SegmentBuffer
    checksums: Checksums
    lease_count: int = 0
    last_used: int = 0
    corrupted: bool = False
    unwanted: bool = False

    @property
    def must_evict(self) -> bool:
        """Whether the segment must be evicted now: no lease holds it, and it is corrupted or unwanted."""
        return not self.lease_count and (self.corrupted or self.unwanted)

    def verify(self, source: Source) -> bool:
        """Compare the bytes with the expected checksums, and note that they were verified.

        Returns False if they differ; True if no checksums are known.
        """
        expected = self.checksums.expected if isinstance(self.checksums, Unverified) else self.checksums
        if expected is not None and source.compute_checksums(self.buffer) != expected:
            return False
        self.checksums = expected
        return True


@dataclass(eq=False)
class PendingRead:
    """A segment that is being read. Its slab is taken, and nobody uses it yet.

    ``waiting``: the leases that will hold it once it is read. The first of them reads it.
    ``unwanted``: see :class:`ResidentSegment`.
    ``finished``: set once it is read, or reading it failed.
    """

    buffer: SegmentBuffer
    waiting: list[Lease]
    unwanted: bool = False
    finished: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Use:
    """How a component will be used.

    ``forward_passes``: number of forward passes.
    ``working_bytes``: bytes that computing uses beside the weights.
    ``upcoming``: the components (:func:`component_key`) wanted after it, the soonest first.
    ``min_bytes_of_later_leases``: bytes to leave for the weights of components that the stage leases after this one:
    :meth:`Planner.min_weight_bytes`.
    ``dequantised_bytes``: bytes to keep for the weights that one operation dequantises. They count like weights.
    ``unread``: names of tensors that the lease never reads. A segment that has no others is not brought into memory.
    """

    forward_passes: int = 1
    working_bytes: int = 0
    upcoming: tuple[str, ...] = ()
    min_bytes_of_later_leases: int = 0
    dequantised_bytes: int = 0
    unread: frozenset[str] = frozenset()


ONCE = Use()

OnChange = Callable[[Sequence[str], bool], None]
"""Called with tensor names and whether they are resident (True) or streamed (False) from now on."""


class LeaseOwner(Protocol):
    """The part of the residency that a lease uses."""

    @property
    def device(self) -> Device: ...

    @property
    def source(self) -> Source: ...

    @property
    def pool(self) -> SlabPool: ...

    def adjust(self, lease: Lease) -> None:
        """See :meth:`Lease.adjust`."""
        ...


class Lease:
    """Holds a component until the lease ends.

    ``needed``: the pieces that are read, in the order of use. The others are neither resident nor streamed.
    ``plan``: its actions and their reasons.
    ``has_plan``: whether the residency has applied a first plan. Until then, ``plan`` is empty.
    ``reservation_entry``: the ledger's entry for the working memory; None before it is reserved, or if none is needed.
    ``weights_modified``: code wrote to the weights.
    """

    def __init__(self, component: ComponentManifest, dtype: torch.dtype, use: Use, owner: LeaseOwner) -> None:
        self.component = component
        self.dtype = dtype
        self.use = use
        self.segments = split_into_segments(component, dtype)
        self.pieces = frozenset(segment.piece for segment in self.segments)
        self.needed = tuple(segment.piece for segment in needed_segments(component, dtype, use.unread))
        self.plan = Plan(())
        self.residents: dict[int, ResidentSegment] = {}
        self.pending: list[PendingRead] = []
        self.ring: Ring | None = None
        self.fetcher: Fetcher | None = None
        self.reservation_entry: int | None = None
        self.weights_modified = False
        self.has_plan = False
        self.on_change: OnChange | None = None
        self._owner = owner
        self._segment_index, self.shapes = index_tensors(component, dtype)
        self.dequantiser = Dequantiser(component, dtype, owner.pool, self.key)

    @property
    def key(self) -> str:
        return component_key(self.component, self.dtype)

    @property
    def lacks_room(self) -> bool:
        """Whether it streams, dequantises, or had others evicted, because not everything fits in memory."""
        return bool(self.plan.slots or self.plan.pieces("drop") or self.dequantiser)

    @property
    def resident_bytes(self) -> int:
        return sum(resident.buffer.segment.nbytes for resident in self.residents.values())

    def resident_tensor(self, name: str) -> torch.Tensor | None:
        """Return the tensor if it is resident. None if it is streamed, quantised or never read."""
        if name in self.use.unread or name in self.dequantiser:
            return None
        resident = self.residents.get(self._segment_index[name])
        return resident.buffer.tensors[name] if resident is not None else None

    @contextlib.contextmanager
    def use_tensors(self, names: Sequence[str]) -> Generator[list[torch.Tensor]]:
        """Yield the named tensors, resident or streamed, for use within the context. Quantised ones are dequantised.

        Raises BindingError for a tensor that :attr:`Use.unread` names.
        """
        if wrong := self.use.unread.intersection(names):
            first, what = min(wrong), self.component.role
            raise BindingError(f"{what}: {first} is read, although its family declares that it never reads it")
        streamed = list(
            dict.fromkeys(self._segment_index[n] for n in names if self._segment_index[n] not in self.residents)
        )
        with contextlib.ExitStack() as stack:
            tensors = {index: resident.buffer.tensors for index, resident in self.residents.items()}
            if streamed:
                assert self.ring is not None
                tensors |= dict(zip(streamed, stack.enter_context(self.ring.use_tensors(*streamed)), strict=True))
            yield [self._dequantised(name, tensors[self._segment_index[name]][name]) for name in names]

    def _dequantised(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as operations use it. ``tensor``: as it is in memory."""
        if name not in self.dequantiser:
            return tensor
        wide = self.dequantiser.dequantise(name, tensor)
        if isinstance(self.component, OverlaidComponent) and name in self.component.overlaid_names:
            assert self.fetcher is not None
            self.fetcher.apply_overlay(name, wide)
        return wide

    @contextlib.contextmanager
    def slab_of(self, index: int) -> Generator[Slab]:
        """Yield the slab of a segment, resident or streamed."""
        resident = self.residents.get(index)
        if resident is not None:
            yield resident.buffer.slab
            return
        assert self.ring is not None
        with self.ring.slab_of(index) as slab:
            yield slab

    def refetch_segment(self, index: int) -> None:
        """Fetch a segment again from its source."""
        resident = self.residents.get(index)
        if resident is None:
            assert self.ring is not None
            self.ring.forget(index)
            return
        assert self.fetcher is not None
        # Mark it as wrong until it has arrived, in case fetching fails.
        resident.corrupted = True
        (resident.checksums,) = self.fetcher.fetch([resident.buffer])
        resident.corrupted = False

    def verify_segment(self, index: int) -> bool:
        """Compare a resident segment with its checksums, and return whether it matches.

        Returns True for a streamed segment: it was read just now.
        """
        resident = self.residents.get(index)
        return resident is None or resident.verify(self._owner.source)

    @property
    def has_unverified(self) -> bool:
        """Whether a resident segment was not verified since it arrived."""
        return any(isinstance(resident.checksums, Unverified) for resident in self.residents.values())

    def adjust(self) -> None:
        """Adapt the lease to the current budget, which may have shrunk or grown. It keeps at least the bytes it needs.

        Call it between two forward passes, while no tensor of this component is in use.
        """
        self._owner.adjust(self)

    def tell_change(self, indices: Collection[int], resident: bool) -> None:
        """Call ``on_change`` for the tensors of some segments, which are resident or streamed from now on."""
        if self.on_change is not None and indices:
            self.on_change([t.name for i in sorted(indices) for t in self.segments[i].tensors], resident)

    def address(self, tensor: torch.Tensor) -> int:
        """Return a tensor's address, for checking its alignment. Only its remainder modulo ALIGNMENT is meaningful."""
        return self._owner.device.address(tensor)

    def mark_corrupted(self, name: str) -> None:
        """Mark a tensor that was written to. Its segment is evicted when its last lease ends."""
        self.weights_modified = True
        resident = self.residents.get(self._segment_index[name])
        if resident is not None:
            resident.corrupted = True

    @property
    def corrupted(self) -> list[str]:
        """The labels of resident segments that are known to be wrong; a lease that shares them may have seen it."""
        return [one.buffer.segment.label for one in self.residents.values() if one.corrupted]

    def verify(self) -> list[str]:
        """Return the labels of resident segments that do not match their checksums. The lease's end evicts them."""
        wrong = [resident for resident in self.residents.values() if not resident.verify(self._owner.source)]
        for resident in wrong:
            resident.corrupted = True
        return [resident.buffer.segment.label for resident in wrong]
