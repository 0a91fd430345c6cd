"""Host memory in maps of its own: aligned, and given back to the system at once, where an allocator would keep it."""

from __future__ import annotations

import mmap

import torch

from safelight.devices.base import aligned
from safelight.devices.failures import translated


def allocate(nbytes: int) -> torch.Tensor:
    """uint8, (nbytes,), zeroed by the system at first touch. Raises OutOfMemoryError.

    Huge pages are asked for, since torch does not: filling new memory is several times as fast with them.
    """
    with translated("a model's weights", aligned(nbytes)):
        pages = mmap.mmap(-1, max(aligned(nbytes), mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 4 << 20:
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)
