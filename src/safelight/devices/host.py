"""Allocates host memory with a separate anonymous mmap for each slab.

So the memory is aligned, and returns to the system as soon as it is freed.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

from safelight.devices.base import aligned
from safelight.devices.failures import translate_torch_errors


def allocate(nbytes: int) -> torch.Tensor:
    """Allocate uint8, (nbytes,). The system zeroes it at first access. Raises OutOfMemoryError.

    It requests huge pages, which torch does not: with them, filling new memory is several times as fast.
    """
    with translate_torch_errors("Allocating a model's weights", aligned(nbytes)):
        pages = mmap.mmap(-1, max(aligned(nbytes), mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 4 << 20:
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)


def make_unwritable(base: torch.Tensor) -> None:
    """Make memory of :func:`allocate` read-only. The kernel kills any process that writes to it: this one or its forks.

    Raises OSError if the kernel refuses.
    """
    library = ctypes.CDLL(None, use_errno=True)
    size = max(aligned(base.numel()), mmap.PAGESIZE)
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    if library.mprotect(ctypes.c_void_p(base.data_ptr()), ctypes.c_size_t(pages), mmap.PROT_READ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
