"""Slabs: large aligned buffers that hold a component's tensors, and are used again.

First touching new memory is slow (2.4 s a gigabyte on a virtual machine whose host took the pages back, 0.3 s
elsewhere), so the slab of the last model is kept for the next. On the host a slab is an anonymous map of its own: what
is given back goes to the system at once and nothing of it stays in an allocator.
"""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, field

import torch

from safelight.devices.failures import translated

ALIGNMENT = 64
"""Bytes. fp32 results on a CPU depend on a weight's address modulo this."""

WASTE = 1.25
"""A kept slab is used for a component if it is at most this many times as large."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class Slab:
    """``base``: uint8, (nbytes,), on one device, starting at a multiple of the alignment."""

    base: torch.Tensor
    nbytes: int
    in_use: bool = field(default=True)

    def holders(self) -> int:
        """How many tensors share the slab's storage, the base not counted."""
        storage = self.base.untyped_storage()
        count: int = torch._C._storage_Use_Count(storage._cdata)
        # The base tensor and the storage object that was just made for asking hold it too.
        return count - 2


class SlabPool:
    """Slabs of one device. ``kept`` bytes are free but not given back; callers bound them with :meth:`trim`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Slab] = []
        self._used: list[Slab] = []
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._used)

    @property
    def kept_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._free)

    def fitting(self, nbytes: int) -> int:
        """Bytes of the kept slab that :meth:`take` would use, 0 when it would make a new one."""
        slab = self._best(nbytes)
        return slab.nbytes if slab else 0

    def take(self, nbytes: int) -> Slab:
        """A slab of at least ``nbytes`` bytes; its content is whatever was there."""
        with self._lock:
            slab = self._best(nbytes)
            if slab is None:
                with translated("a model's weights", aligned(nbytes)):
                    slab = Slab(_allocate(aligned(nbytes), self.device), aligned(nbytes))
            else:
                self._free.remove(slab)
                slab.in_use = True
            self._used.append(slab)
            return slab

    def give(self, slab: Slab) -> bool:
        """Take a slab back. False when somebody still holds a tensor of it: then it is not used again."""
        with self._lock:
            self._used.remove(slab)
            slab.in_use = False
            if slab.holders() > 0:
                return False
            self._free.append(slab)
            return True

    def trim(self, kept_bytes: int) -> None:
        """Give kept slabs back to the system, the oldest first, until at most ``kept_bytes`` are kept."""
        with self._lock:
            while self._free and self.kept_bytes > kept_bytes:
                self._free.pop(0)

    def _best(self, nbytes: int) -> Slab | None:
        fitting = [slab for slab in self._free if aligned(nbytes) <= slab.nbytes <= aligned(nbytes) * WASTE]
        return min(fitting, key=lambda slab: slab.nbytes, default=None)


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(max(nbytes, ALIGNMENT), dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
