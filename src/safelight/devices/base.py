"""What a device is to the rest of Safelight: memory that can be had and given back, copies with fences, and a clock.

Four kinds: ``cpu``, ``cuda``, ``mps``, and ``simulated``, an accelerator in CPU memory that can fail on purpose. One
contract suite (``tests/contracts``) runs over all that are there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

ALIGNMENT = 64
"""Bytes. fp32 results on a CPU depend on a weight's address modulo this; every allocation starts at a multiple."""


AHEAD = 2
"""Segments are not equal: with two on their way, a small one does not leave the copies idle behind a large one."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Fence(Protocol):
    """Stands for work that was submitted. Until it is passed, sources must not be freed nor targets read."""

    def wait(self) -> None:
        """Return when the work is done. Raises what went wrong in it. Waiting twice is allowed."""
        ...


class Passed:
    """A fence of work that was done at once."""

    def wait(self) -> None:
        return


PASSED = Passed()


class Device(Protocol):
    """One device. Safe to be used by several threads."""

    @property
    def name(self) -> str:
        """What settings and metadata call it: ``cpu``, ``cuda``, ``mps``, ``simulated``."""
        ...

    @property
    def torch(self) -> torch.device:
        """Where torch computes for this device."""
        ...

    @property
    def separate(self) -> bool:
        """Whether its memory is another than the host's: then weights are copied to it, else they are read into it."""
        ...

    @property
    def ahead(self) -> int:
        """How many segments are brought while one is used: some where it computes by itself while the host moves bytes,
        none where moving and computing share the cores."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8, (nbytes,), at an aligned address; its content is arbitrary. Raises OutOfMemoryError."""
        ...

    def release(self, base: torch.Tensor) -> None:
        """Give an allocation back. Nobody holds a tensor of it any more, and no submitted work uses it."""
        ...

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        """The storage that all tensors of an allocation share: how many hold it tells whether it is in use."""
        ...

    def address(self, tensor: torch.Tensor) -> int:
        """Where a tensor starts in the device's memory."""
        ...

    def rounded(self, nbytes: int) -> int:
        """The bytes that its allocator takes for an allocation of ``nbytes``."""
        ...

    def allocated(self) -> int | None:
        """Bytes that its allocator has given out, None where that is not known (the host's)."""
        ...

    def available(self) -> int:
        """Bytes that could still be had now, by everything that bounds this process."""
        ...

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        """Copy host bytes to the device: both uint8 and contiguous, of one size. May return before it is done.

        Computing that uses the target must be done: the caller has waited for its :meth:`mark`.
        """
        ...

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        """Copy device bytes to the host. May return before it is done; what computes the source must be done."""
        ...

    asynchronous: bool
    """Whether copies may return before they are done. The self-test (:mod:`safelight.devices.selftest`) sets it, by
    what it saw on this machine."""

    def aside(self) -> AbstractContextManager[object]:
        """Within the context, work goes to where copies go: done in the order in which both were submitted, without
        waiting for computing."""
        ...

    def mark(self) -> Fence:
        """A fence that is passed when all computing submitted so far is done."""
        ...

    @property
    def stage_bytes(self) -> int:
        """Size of the buffers through which pushes go fast, unless the self-test measured a better one; 0 where they go
        as fast from any host memory."""
        ...

    def staging(self, nbytes: int) -> torch.Tensor:
        """Host memory from which pushes go fastest (page-locked on CUDA): uint8, (nbytes,), aligned."""
        ...
