"""NVIDIA GPUs. Copies run from page-locked memory on a separate stream, and CUDA events are the fences.

This code needs a GPU. The contract suite runs it on machines with one (``make contracts DEVICE=cuda``).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable

import torch

from safelight.devices import machine
from safelight.devices.base import READ_AHEAD, Fence
from safelight.devices.failures import translate_torch_errors

STAGE_BYTES = 32 << 20
"""Bytes of each of two page-locked buffers: enough for full bus speed, small enough for every machine."""

WORKSPACE = ":4096:8"
"""cuBLAS results are bit-identical from call to call only with a workspace of fixed size (here 32 MiB).

torch's deterministic mode looks for it in the environment, so the setter of ``torch.backends.cuda`` is not enough.
"""

_PARTS = re.compile(r":(\d+):(\d+)")
"""A part of the variable: the size of a buffer in KiB, and the number of such buffers."""


def _workspace_bytes() -> int:
    """Return the size of a workspace of cuBLAS in bytes."""
    # A host program may have set another size with this function. An older torch does not have it, and there the
    # variable is the only way to set a size.
    size_in_torch: Callable[[], int] | None = getattr(torch.backends.cuda, "cublas_workspace_size", None)
    if size_in_torch is not None:
        return size_in_torch()
    parts = _PARTS.findall(os.environ.get("CUBLAS_WORKSPACE_CONFIG", WORKSPACE))
    return sum(int(kibibytes) * int(count) for kibibytes, count in parts) << 10


class _Event:
    """A CUDA event as a fence."""

    def __init__(self, stream: torch.cuda.Stream, keep: object = None) -> None:
        # The event must be recorded on the stream that has the work. The current stream may be another (row COPY 04).
        self._event = torch.cuda.Event()
        self._event.record(stream)
        self._keep = keep

    def wait(self) -> None:
        self._event.synchronize()
        self._keep = None


class CUDA:
    """See :class:`safelight.devices.base.Device`."""

    name = "cuda"
    has_own_memory = True
    read_ahead = READ_AHEAD
    staging_buffer_bytes = STAGE_BYTES
    asynchronous = True

    def __init__(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self._device)
        self.shares_host_memory = bool(torch.cuda.get_device_properties(self._device).is_integrated)

    @property
    def torch(self) -> torch.device:
        return self._device

    def allocate(self, nbytes: int) -> torch.Tensor:
        with translate_torch_errors("Allocating a model's weights", nbytes):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, base: torch.Tensor) -> None:
        # The allocator may reuse the bytes at once, so no copy may still work on them. With `record_stream` instead, it
        # would count them as requested until its next allocation.
        del base
        self._copies.synchronize()

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return base.untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def rounded(self, nbytes: int) -> int:
        # A block can be up to 2 MiB larger (kRoundLarge in c10/core/AllocatorConfig.h). `available` sees whole blocks.
        return nbytes

    def allocated(self) -> int | None:
        # What was requested, and not `memory_allocated`, which counts whole blocks.
        return int(torch.cuda.memory_stats(self._device).get("requested_bytes.all.current", 0))

    def reset_peak(self) -> int:
        # The allocator counts at each request, in the order of the program, so no short-lived tensor is missed. Whole
        # blocks are counted, because that is what computing needs. The count is the process's own: a program that
        # reads it must do so before it uses Safelight.
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def available(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        if self.shares_host_memory:
            # The driver does not count cached file pages as free, although the system gives them up when needed.
            free = machine.tightest_limit().available
        counts = torch.cuda.memory_stats(self._device)
        reserved, active = counts.get("reserved_bytes.all.current", 0), counts.get("active_bytes.all.current", 0)
        # Free parts of blocks that are partly in use cannot serve a large allocation. Expandable segments
        # (PYTORCH_ALLOC_CONF) are not counted as split, because their free pages can be unmapped. So with them `unused`
        # contains the free parts of their pages (2 and 20 MiB), which is more than can be allocated by that much.
        unused = reserved - active - counts.get("inactive_split_bytes.all.current", 0)
        allowed = torch.cuda.get_per_process_memory_fraction(self._device) * total - active
        # A thread's first matrix product allocates the workspace.
        return max(0, int(min(free + unused, allowed)) - _workspace_bytes())

    def free_cache(self) -> None:
        torch.cuda.empty_cache()
        # Page-locked memory has a cache of its own. `torch.accelerator.empty_host_cache` would do the same, but for
        # torch's one current accelerator, which is another one if a further backend is registered.
        empty_host_cache: Callable[[], None] = torch._C._host_emptyCache  # pyright: ignore[reportAttributeAccessIssue]
        empty_host_cache()

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._copy(source, target)

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._copy(source, target)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=self.asynchronous)
        return _Event(self._copies, (source, target))

    def copy_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    def record_fence(self) -> Fence:
        return _Event(torch.cuda.current_stream(self._device))

    def staging(self, nbytes: int) -> torch.Tensor:
        with translate_torch_errors("Allocating page-locked memory for copies", nbytes):
            # The device is named, because a host program may have another default.
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
