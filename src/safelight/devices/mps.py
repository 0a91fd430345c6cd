"""Apple GPUs.

Asynchronous copies have read sources that were freed already (row COPY 01). So copies are synchronous, unless the
self-test showed that asynchronous ones are correct. In both cases, sources stay alive until the fence passes.

This code needs an Apple GPU. The contract suite runs it on machines with one (``make contracts DEVICE=mps``).
"""

from __future__ import annotations

import contextlib
import os

import torch

from safelight.devices import host, machine
from safelight.devices.base import ALIGNMENT, PASSED, Fence
from safelight.devices.failures import translate_torch_errors

PIECE = 1 << 30
"""Bytes of each piece of a copy. Copies of 4 GiB and more were corrupted (row COPY 08); pieces are far smaller."""


def _allowed_share() -> float:
    """Return the share of the memory which the driver recommends that torch's allocator may use, at most 1.

    torch allows 1.7 by default, and 0 is no limit. Memory beyond what the driver recommends is slow, as it is swapped.
    """
    share = float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO") or 1.0)
    return min(share, 1.0) or 1.0


class _Synchronize:
    """A fence that passes when all submitted work is done. It keeps a copy's source and target alive."""

    def __init__(self, keep: object = None) -> None:
        self._keep = keep

    def wait(self) -> None:
        torch.mps.synchronize()
        self._keep = None


class MPS:
    """See :class:`safelight.devices.base.Device`. Its memory is host memory, but a tensor belongs to one side only."""

    name = "mps"
    has_own_memory = True
    shares_host_memory = True
    # PyTorch has one stream for MPS, and two threads that use it can abort the process
    # (https://github.com/pytorch/pytorch/issues/197805). So nothing is read ahead.
    wants_one_thread = True
    read_ahead = 0
    staging_buffer_bytes = 0
    asynchronous = False

    @property
    def torch(self) -> torch.device:
        return torch.device("mps")

    def allocate(self, nbytes: int) -> torch.Tensor:
        with translate_torch_errors("Allocating a model's weights", nbytes):
            return torch.empty(nbytes, dtype=torch.uint8, device="mps")

    def release(self, base: torch.Tensor) -> None:
        # The caller still holds the tensor, so the allocator's cache cannot be emptied here.
        del base
        torch.mps.synchronize()

    def free_cache(self) -> None:
        torch.mps.empty_cache()

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return base.untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        # On MPS, ``data_ptr`` of a storage is a handle, which differs between storages. Allocations are aligned.
        handle = tensor.untyped_storage().data_ptr() // ALIGNMENT * ALIGNMENT
        return handle + int(tensor.storage_offset()) * tensor.element_size()

    def rounded(self, nbytes: int) -> int:
        return nbytes

    def allocated(self) -> int | None:
        return None

    def available(self) -> int:
        # Tensors count, and not all that the driver has allocated: torch empties its cache before it raises.
        tensors = torch.mps.current_allocated_memory()
        cached = max(0, torch.mps.driver_allocated_memory() - tensors)
        allowed = int(torch.mps.recommended_max_memory() * _allowed_share()) - tensors
        return max(0, min(allowed, machine.tightest_limit().available + cached))

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._copy(source, target)

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        return self._copy(source, target)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        for at in range(0, source.numel(), PIECE):
            target[at : at + PIECE].copy_(source[at : at + PIECE], non_blocking=self.asynchronous)
        if self.asynchronous:
            return _Synchronize((source, target))
        torch.mps.synchronize()
        return PASSED

    def copy_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record_fence(self) -> Fence:
        return _Synchronize()

    def staging(self, nbytes: int) -> torch.Tensor:
        return host.allocate(nbytes)
