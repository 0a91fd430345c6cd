"""Slabs: aligned, reusable allocations that hold a segment's tensors.

The first access to new memory is slow: 2.4 s per gigabyte on a virtual machine whose host took the pages back, 0.3 s
on other machines. So the pool caches the slabs of the last model for the next one.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field

import torch

from safelight.devices.base import PASSED, Device, Fence, aligned
from safelight.errors import OutOfMemoryError


class AllocationRecorder:
    """Interface for recording allocations. This base class records nothing.

    :class:`safelight.memory.account.LedgerRecorder` charges a ledger.
    """

    def charge(self, nbytes: int, owner: str, reason: str, over_budget: bool = False) -> int:
        del nbytes, owner, reason, over_budget
        return 0

    def rename(self, number: int, owner: str, reason: str) -> None:
        del number, owner, reason

    def credit(self, number: int) -> None:
        del number


@dataclass(eq=False)
class Slab:
    """An allocation of the pool.

    ``base``: uint8, (nbytes,), at a multiple of the alignment.
    ``number``: the recorder's number for the allocation.
    ``busy``: fence of submitted work that may still use it.
    ``sealed``: it is read-only, so it cannot be reused.
    """

    base: torch.Tensor
    nbytes: int
    number: int
    device: Device
    busy: Fence = field(default=PASSED)
    sealed: bool = False

    def holders(self) -> int:
        """Return how many tensors share the slab's storage, without the base."""
        storage = self.device.storage(self.base)
        count: int = torch._C._storage_Use_Count(storage._cdata)
        # The base tensor and the storage object of this call hold it too.
        return count - 2


class SlabPool:
    """Slabs of one device.

    A slab is in use, cached for reuse, or lingering: it was returned while somebody still held one of its tensors.
    ``recorder`` charges every allocation, and credits it when its bytes are freed.
    """

    def __init__(self, device: Device, recorder: AllocationRecorder | None = None) -> None:
        self.device = device
        self._recorder = recorder or AllocationRecorder()
        self._cached: list[Slab] = []
        self._used: list[Slab] = []
        self._lingering: list[Slab] = []
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(slab.nbytes for slab in self._used)

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(slab.nbytes for slab in self._cached)

    @property
    def lingering_bytes(self) -> int:
        """Bytes of returned slabs whose tensors somebody still holds."""
        with self._lock:
            self._free_lingering()
            return sum(slab.nbytes for slab in self._lingering)

    def take(self, nbytes: int, owner: str = "", reason: str = "weights", over_budget: bool = False) -> Slab:
        """Return a slab of ``nbytes`` bytes, rounded up. Its content is arbitrary, and no submitted work uses it.

        The pool reuses a cached slab of the same size if it has one, because checkpoints of one architecture have the
        same segments. Otherwise it allocates a slab, and frees cached ones if it needs the room.

        ``owner``, ``reason``: for the recorder's entry.
        ``over_budget``: record the allocation even if it exceeds the budget.
        Raises OutOfMemoryError if the allocation fails, and OverBudget if the ledger's budget is exhausted.
        """
        size = max(aligned(nbytes), 1)
        with self._lock:
            self._free_lingering()
            slab = next((slab for slab in self._cached if slab.nbytes == size), None)
            if slab is not None:
                self._cached.remove(slab)
                self._recorder.rename(slab.number, owner, reason)
            else:
                slab = self._new(size, owner, reason, over_budget)
            self._used.append(slab)
        slab.busy.wait()
        slab.busy = PASSED
        return slab

    def _new(self, size: int, owner: str, reason: str, over_budget: bool) -> Slab:
        while True:
            try:
                return self._allocate(size, owner, reason, over_budget)
            except (MemoryError, OutOfMemoryError):
                if not self._cached and not self.collect():
                    raise
            if self._cached:
                self._drop(self._cached.pop(0))

    def collect(self) -> bool:
        """Run the garbage collector if slabs linger. Returns whether bytes were freed.

        Reference cycles, such as an error and its frames, may be all that still holds their tensors.
        """
        before = self.lingering_bytes
        if before:
            gc.collect()
        return self.lingering_bytes < before

    def _allocate(self, size: int, owner: str, reason: str, over_budget: bool) -> Slab:
        number = self._recorder.charge(self.device.rounded(size), owner, reason, over_budget)
        try:
            base = self.device.allocate(size)
            # Submitted computations may still use these bytes, so nobody may write to them before the fence passes.
            return Slab(base, size, number, self.device, self.device.record_fence())
        except BaseException:
            self._recorder.credit(number)
            raise

    def give(self, slab: Slab, keep: bool = True) -> bool:
        """Return a slab to the pool. It becomes reusable when the work submitted so far is done.

        ``keep``: cache the slab for reuse, else free it.

        Returns False if somebody still holds one of its tensors. Then the slab lingers: its bytes count until the last
        tensor is released, and it is not reused.
        """
        with self._lock:
            self._used.remove(slab)
            if slab.holders() > 0:
                self._recorder.rename(slab.number, "unknown", "tensors are still held after the slab was returned")
                self._lingering.append(slab)
                return False
            slab.busy = self.device.record_fence()
            if keep and not slab.sealed:
                self._recorder.rename(slab.number, "", "cached for reuse")
                self._cached.append(slab)
            else:
                self._drop(slab)
            return True

    def trim(self, cached_bytes: int = 0) -> None:
        """Free cached slabs, the oldest first, until at most ``cached_bytes`` bytes are cached."""
        with self._lock:
            self._free_lingering()
            while self._cached and self.cached_bytes > cached_bytes:
                self._drop(self._cached.pop(0))

    def _free_lingering(self) -> None:
        for slab in [slab for slab in self._lingering if slab.holders() == 0]:
            self._lingering.remove(slab)
            self._drop(slab)

    def _drop(self, slab: Slab) -> None:
        try:
            slab.busy.wait()
            base = slab.base
            slab.base = _NOTHING
            self.device.release(base)
            del base
        finally:
            self._recorder.credit(slab.number)


_NOTHING = torch.empty(0, dtype=torch.uint8)
