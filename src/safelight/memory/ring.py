"""The ring: a few slots into which segments are streamed when they are used, or shortly before.

Callers ask for a segment by its index. A slot is filled again only if its segment is not in use, nobody holds one of
its tensors, and the device has finished all work that uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from safelight.devices.base import PASSED, Fence
from safelight.devices.failures import translate_torch_errors
from safelight.devices.pool import Slab, SlabPool
from safelight.memory.segments import Segment
from safelight.memory.source import Checksums, SegmentBuffer


@dataclass(eq=False)
class _Slot:
    """A slot.

    ``last_used``: a counter, not a time; 0 before the first use.
    ``view_escaped``: a tensor or view of the slot was still referenced when its use ended.
    ``fence``: of the work that used it.
    """

    slab: Slab
    index: int = -1
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    users: int = 0
    last_used: int = 0
    view_escaped: bool = False
    fence: Fence = PASSED
    pending: Future[None] | None = None


class Ring:
    """Streams ``segments`` (in the order of use) through slabs of the pool.

    ``fetch``: see :class:`safelight.memory.source.Fetcher`.
    ``ahead``: how many segments a separate thread reads ahead while another is used. With 0, the caller's thread reads
    each segment when the caller asks for it.
    ``forward_passes``: how often all segments are used. Nothing is read ahead after the last pass.
    """

    def __init__(
        self,
        pool: SlabPool,
        fetch: Callable[[Sequence[SegmentBuffer]], list[Checksums]],
        segments: Sequence[Segment],
        slots: int,
        ahead: int,
        forward_passes: int,
        owner: str,
    ) -> None:
        self._pool = pool
        self._fetch = fetch
        self._segments = list(segments)
        self._position_by_index = {segment.piece.index: position for position, segment in enumerate(self._segments)}
        self._uses_left = forward_passes * len(self._segments)
        self._ahead = min(ahead, len(self._segments) - 1)
        self._owner = owner
        self._size = max(segment.nbytes for segment in self._segments)
        self._slots: list[_Slot] = []
        self._clock = 0
        self._lock = threading.RLock()
        self._thread = ThreadPoolExecutor(1, "safelight-ahead") if self._ahead else None
        try:
            for _ in range(slots):
                self._slots.append(_Slot(self._take_slab()))
        except BaseException:
            self.close()
            raise

    def __contains__(self, index: int) -> bool:
        return index in self._position_by_index

    @property
    def nbytes(self) -> int:
        return sum(slot.slab.nbytes for slot in self._slots)

    @contextmanager
    def use_tensors(self, *indices: int) -> Generator[list[dict[str, torch.Tensor]]]:
        """Yield the tensors of several segments. Their slots are not filled again within the context."""
        with self._lock:
            slots: list[_Slot] = []
            try:
                for index in indices:
                    slot = self._slot(index)
                    slot.users += 1
                    slots.append(slot)
            except BaseException:
                for slot in slots:
                    slot.users -= 1
                raise
        try:
            yield [slot.tensors for slot in slots]
        finally:
            with self._lock:
                for slot in slots:
                    slot.fence = self._pool.device.record_fence()
                    slot.view_escaped |= slot.slab.holders() > len(slot.tensors)
                    slot.users -= 1

    @contextmanager
    def slab_of(self, index: int) -> Generator[Slab]:
        """Yield a segment's slab, so that the caller can copy it."""
        with self.use_tensors(index):
            with self._lock:
                slab = next(slot.slab for slot in self._slots if slot.index == index)
            yield slab

    def forget(self, index: int) -> None:
        """Discard a segment, so that its next use reads it again."""
        with self._lock:
            for slot in self._slots:
                if slot.index == index:
                    slot.tensors, slot.index = {}, -1

    def _slot(self, index: int) -> _Slot:
        """Return the slot that holds the segment, and start reading the next segments ahead."""
        slot = next((slot for slot in self._slots if slot.index == index), None)
        if slot is not None and slot.pending is not None:
            pending, slot.pending = slot.pending, None
            try:
                pending.result()
            except BaseException:
                slot.tensors, slot.index = {}, -1
                raise
        if slot is None:
            slot = self._free_slot(index)
            self._fill(slot, index)
        self._clock += 1
        fresh = slot.last_used == 0
        slot.last_used = self._clock
        if fresh:
            self._uses_left -= 1
            slot.users += 1
            try:
                self._read_ahead(index)
            finally:
                slot.users -= 1
        return slot

    def _read_ahead(self, index: int) -> None:
        position = self._position_by_index[index]
        for step in range(1, min(self._ahead, self._uses_left) + 1):
            following = self._segments[(position + step) % len(self._segments)].piece.index
            if self._thread is None or any(slot.index == following for slot in self._slots):
                continue
            # Reading ahead is optional: it needs an idle slot.
            if not any(slot.users == 0 and slot.slab.holders() <= len(slot.tensors) for slot in self._slots):
                return
            slot = self._free_slot(following)
            try:
                slot.pending = self._thread.submit(self._fill, slot, following)
            except RuntimeError:
                slot.index = -1
                return

    def _free_slot(self, index: int) -> _Slot:
        """Free the least recently used idle slot for segment ``index``.

        If somebody still holds tensors of that slot, a new slot replaces it. If no slot is idle, because one operation
        uses tensors of more segments than there are slots, a slot is added.
        """
        idle = [slot for slot in self._slots if slot.users == 0]
        slot = min(idle, key=lambda slot: (slot.pending is not None, slot.last_used), default=None)
        if slot is not None:
            if slot.pending is not None:
                slot.pending.exception()
            slot.tensors, slot.pending = {}, None
            # If a view of the slot outlived its operation, a later operation may have used it: so wait for all work
            # submitted until now, not only for the slot's own fence.
            (self._pool.device.record_fence() if slot.view_escaped else slot.fence).wait()
            if slot.slab.holders() > 0:
                self._slots.remove(slot)
                self._pool.give(slot.slab)
                slot = None
        if slot is None:
            slot = _Slot(self._take_slab())
            self._slots.append(slot)
        slot.index, slot.last_used, slot.fence, slot.view_escaped = index, 0, PASSED, False
        return slot

    def _take_slab(self) -> Slab:
        with translate_torch_errors(f"Streaming the {self._owner}", self._size):
            slab = self._pool.take(self._size, self._owner, "ring slot")
        if not self._pool.device.has_own_memory:
            # The system allocates memory when it is first written. If that happened while a stage runs, the measured
            # working memory would be too high.
            slab.base.fill_(0)
        return slab

    def _fill(self, slot: _Slot, index: int) -> None:
        buffer = SegmentBuffer.of(self._segments[self._position_by_index[index]], slot.slab)
        try:
            self._fetch([buffer])
        except BaseException:
            slot.index = -1
            raise
        slot.tensors = buffer.tensors

    def close(self) -> None:
        """Wait until nothing is read ahead any more, and return all slots to the pool."""
        with self._lock:
            if self._thread is not None:
                self._thread.shutdown(wait=True, cancel_futures=True)
            while self._slots:
                slot = self._slots.pop()
                slot.tensors, slot.pending = {}, None
                self._pool.give(slot.slab)
