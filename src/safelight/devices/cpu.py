"""The CPU as a device: it uses host memory, and nothing is asynchronous."""

from __future__ import annotations

import contextlib

import torch

from safelight.devices import host, machine
from safelight.devices.base import PASSED, Fence


class CPU:
    """See :class:`safelight.devices.base.Device`."""

    name = "cpu"
    has_own_memory = False
    read_ahead = 0
    staging_buffer_bytes = 0
    asynchronous = False

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        return host.allocate(nbytes)

    def release(self, base: torch.Tensor) -> None:
        del base

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        return base.untyped_storage()

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def rounded(self, nbytes: int) -> int:
        return nbytes

    def allocated(self) -> int | None:
        return None

    def available(self) -> int:
        return machine.tightest_limit().available

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        target.copy_(source)
        return PASSED

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        target.copy_(source)
        return PASSED

    def copy_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record_fence(self) -> Fence:
        return PASSED

    def staging(self, nbytes: int) -> torch.Tensor:
        return host.allocate(nbytes)
