"""Host memory in maps of its own: aligned, and given back to the system at once, where an allocator would keep it."""

from __future__ import annotations

import ctypes
import mmap
import os

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


def make_unwritable(base: torch.Tensor) -> None:
    """From now on the kernel kills whoever writes into memory of :func:`allocate`, in this process and its forks."""
    library = ctypes.CDLL(None, use_errno=True)
    size = max(aligned(base.numel()), mmap.PAGESIZE)
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    if library.mprotect(ctypes.c_void_p(base.data_ptr()), ctypes.c_size_t(pages), mmap.PROT_READ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
