"""NVIDIA GPUs. Copies run from page-locked memory on a separate stream, and CUDA events are the fences.

This code needs a GPU. The contract suite runs it on machines with one (``make contracts DEVICE=cuda``).
"""

from __future__ import annotations

import contextlib
import os

import torch

from safelight.devices.base import READ_AHEAD, Fence
from safelight.devices.failures import translate_memory_errors

ROUNDING = 512
"""Bytes: the granularity of PyTorch's caching allocator for small blocks."""

LARGE, LARGE_ROUNDING = 10 << 20, 2 << 20
"""Bytes. From this size on, the allocator asks the driver for segments of a multiple of 2 MiB, and leaves a remainder
of less than 1 MiB in the block (``kMinLargeAlloc`` and ``kRoundLarge`` in c10/cuda/CUDACachingAllocator.cpp)."""

STAGE_BYTES = 32 << 20
"""Bytes of each of two page-locked buffers: enough for full bus speed, small enough for every machine."""

WORKSPACE = ":4096:8"
"""cuBLAS results are bit-identical from call to call only with a workspace of fixed size (here 32 MB)."""

WORKSPACE_BYTES = 8 * 4096 * 1024


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

    @property
    def torch(self) -> torch.device:
        return self._device

    def allocate(self, nbytes: int) -> torch.Tensor:
        with translate_memory_errors("Allocating a model's weights", nbytes):
            return torch.empty(self.rounded(nbytes), dtype=torch.uint8, device=self._device)[:nbytes]

    def release(self, base: torch.Tensor) -> None:
        # Without this, the allocator may reuse the bytes while the copy stream still works on them.
        base.record_stream(self._copies)

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return base.untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def rounded(self, nbytes: int) -> int:
        unit = LARGE_ROUNDING if nbytes >= LARGE else ROUNDING
        return -(-nbytes // unit) * unit

    def allocated(self) -> int | None:
        # What was requested, and not `memory_allocated`: that counts whole blocks, with remainders that are not split.
        return int(torch.cuda.memory_stats(self._device).get("requested_bytes.all.current", 0))

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(0, free + cached - WORKSPACE_BYTES)

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
        with translate_memory_errors("Allocating page-locked memory for copies", nbytes):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
