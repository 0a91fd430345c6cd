"""Slabs: aligned allocations that hold a segment's tensors, and are used again.

First touching new memory is slow (2.4 s a gigabyte on a virtual machine whose host took the pages back, 0.3 s
elsewhere), so the slabs of the last model are kept for the next.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field

import torch

from safelight.devices.base import PASSED, Device, Fence, aligned
from safelight.errors import OutOfMemoryError


class Book:
    """Who is told of allocations: nobody here, a ledger in :class:`safelight.memory.residency.Account`."""

    def charge(self, nbytes: int, owner: str, reason: str) -> int:
        del nbytes, owner, reason
        return 0

    def rename(self, number: int, owner: str, reason: str) -> None:
        del number, owner, reason

    def credit(self, number: int) -> None:
        del number


@dataclass(eq=False)
class Slab:
    """``base``: uint8, (nbytes,), at a multiple of the alignment. ``busy``: what was submitted and may still use it.
    ``sealed``: it cannot be written any more, and so not be used again."""

    base: torch.Tensor
    nbytes: int
    number: int
    device: Device
    busy: Fence = field(default=PASSED)
    sealed: bool = False

    def holders(self) -> int:
        """How many tensors share the slab's storage, the base not counted."""
        storage = self.device.storage(self.base)
        count: int = torch._C._storage_Use_Count(storage._cdata)
        # The base tensor and the storage object that was just made for asking hold it too.
        return count - 2


class SlabPool:
    """Slabs of one device: in use, kept for the next, and lingering (given back while somebody held a tensor).

    Every allocation is charged to ``book`` when it is made and credited when its bytes are gone.
    """

    def __init__(self, device: Device, book: Book | None = None) -> None:
        self.device = device
        self._book = book or Book()
        self._kept: list[Slab] = []
        self._used: list[Slab] = []
        self._lingering: list[Slab] = []
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(slab.nbytes for slab in self._used)

    @property
    def kept_bytes(self) -> int:
        with self._lock:
            return sum(slab.nbytes for slab in self._kept)

    @property
    def lingering_bytes(self) -> int:
        """Bytes that somebody still holds although they were given back."""
        with self._lock:
            self._settle()
            return sum(slab.nbytes for slab in self._lingering)

    def take(self, nbytes: int, owner: str = "", reason: str = "weights") -> Slab:
        """A slab of ``nbytes`` bytes, rounded up; its content is whatever was there, and nothing submitted uses it.

        A kept slab of that size is used, as checkpoints of one architecture have the same segments; others are given
        back as far as room must be made. Raises OutOfMemoryError, and the MemoryError with which the book refuses.
        """
        size = max(aligned(nbytes), 1)
        with self._lock:
            self._settle()
            slab = next((slab for slab in self._kept if slab.nbytes == size), None)
            if slab is not None:
                self._kept.remove(slab)
                self._book.rename(slab.number, owner, reason)
            else:
                slab = self._new(size, owner, reason)
            self._used.append(slab)
        slab.busy.wait()
        slab.busy = PASSED
        return slab

    def _new(self, size: int, owner: str, reason: str) -> Slab:
        while True:
            try:
                return self._allocated(size, owner, reason)
            except (MemoryError, OutOfMemoryError):
                if not self._kept and not self.collect():
                    raise
            if self._kept:
                self._drop(self._kept.pop(0))

    def collect(self) -> bool:
        """Whether bytes came free that nothing but a circle of references still held: an error and its frames."""
        before = self.lingering_bytes
        if before:
            gc.collect()
        return self.lingering_bytes < before

    def _allocated(self, size: int, owner: str, reason: str) -> Slab:
        number = self._book.charge(self.device.rounded(size), owner, reason)
        try:
            base = self.device.allocate(size)
            # The allocator may have given out what submitted computing still uses: nobody else may write there yet.
            return Slab(base, size, number, self.device, self.device.mark())
        except BaseException:
            self._book.credit(number)
            raise

    def give(self, slab: Slab, keep: bool = True) -> bool:
        """Take a slab back, after what is submitted now is done with it. False when somebody still holds a tensor.

        Then it lingers: its bytes count until the last holder is gone, and it is not used again.
        """
        with self._lock:
            self._used.remove(slab)
            if slab.holders() > 0:
                self._book.rename(slab.number, "somebody", "still held after it was given back")
                self._lingering.append(slab)
                return False
            slab.busy = self.device.mark()
            if keep and not slab.sealed:
                self._book.rename(slab.number, "", "kept for the next")
                self._kept.append(slab)
            else:
                self._drop(slab)
            return True

    def trim(self, kept_bytes: int = 0) -> None:
        """Give kept slabs back to the system, the oldest first, until at most ``kept_bytes`` are kept."""
        with self._lock:
            self._settle()
            while self._kept and self.kept_bytes > kept_bytes:
                self._drop(self._kept.pop(0))

    def _settle(self) -> None:
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
            self._book.credit(slab.number)


_NOTHING = torch.empty(0, dtype=torch.uint8)
