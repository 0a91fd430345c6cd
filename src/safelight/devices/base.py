"""The Device protocol: memory that can be allocated and released, and copies with fences.

There are four kinds: ``cpu``, ``cuda``, ``mps``, and ``simulated``, an accelerator in CPU memory that can fail on
purpose. One contract suite (``tests/contracts``) runs over all kinds that the machine has.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch

ALIGNMENT = 64
"""Bytes. fp32 results on a CPU depend on a weight's address modulo this. Every allocation starts at a multiple."""


READ_AHEAD = 2
"""How many segments the ring reads ahead. With two, copying stays busy while a large one is used: sizes differ."""


def aligned(nbytes: int) -> int:
    """Round ``nbytes`` up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Fence(Protocol):
    """Marks submitted work. Until it has passed, do not free the work's sources or read its targets."""

    def wait(self) -> None:
        """Return when the work is done. Raises the work's error. It may be called twice."""
        ...


class Passed:
    """The fence of work that is done already."""

    def wait(self) -> None:
        return


PASSED = Passed()


class Device(Protocol):
    """One device. Thread-safe."""

    @property
    def name(self) -> str:
        """Its name in settings and metadata: ``cpu``, ``cuda``, ``mps``, ``simulated``."""
        ...

    @property
    def torch(self) -> torch.device:
        """The torch device that computes for this device."""
        ...

    @property
    def has_own_memory(self) -> bool:
        """Whether it has its own memory.

        If True, weights are copied to it from host memory. If False, it computes with the weights in host memory.
        """
        ...

    @property
    def read_ahead(self) -> int:
        """How many segments the ring reads ahead while one is used.

        It is 0 if copying and computing share the cores, and more if the device computes while the host copies.
        """
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate uint8, (nbytes,), at an aligned address, with arbitrary content. Raises OutOfMemoryError."""
        ...

    def release(self, base: torch.Tensor) -> None:
        """Free an allocation. The caller ensures that no tensor of it is held and no submitted work uses it."""
        ...

    def storage(self, base: torch.Tensor) -> torch.UntypedStorage:
        """Return the storage that all tensors of an allocation share. Its reference count tells if it is in use."""
        ...

    def address(self, tensor: torch.Tensor) -> int:
        """Return the address of a tensor in the device's memory."""
        ...

    def rounded(self, nbytes: int) -> int:
        """Return the bytes that the allocator uses for an allocation of ``nbytes``."""
        ...

    def allocated(self) -> int | None:
        """Return the bytes that the allocator has allocated, None if that is unknown (host memory)."""
        ...

    def available(self) -> int:
        """Return the bytes that this process can still allocate now, within all of its limits."""
        ...

    def push(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        """Copy host bytes to the device. May return before the copy is done.

        ``source``, ``target``: uint8, contiguous, of the same size.
        The caller has waited for :meth:`record_fence`, so that no computation uses the target any more.
        """
        ...

    def pull(self, source: torch.Tensor, target: torch.Tensor) -> Fence:
        """Copy device bytes to the host. May return before the copy is done. The source must be computed already."""
        ...

    asynchronous: bool
    """Whether copies may return before they are done. The self-test (:mod:`safelight.devices.selftest`) sets it from
    its result on this machine."""

    def copy_stream(self) -> AbstractContextManager[object]:
        """Within the context, submit work to the copy stream.

        It runs in order with the copies, and does not wait for computing.
        """
        ...

    def record_fence(self) -> Fence:
        """Return a fence that passes when all computing submitted so far is done."""
        ...

    @property
    def staging_buffer_bytes(self) -> int:
        """Default size in bytes of the staging buffers for pushes. The self-test may measure a better one.

        0: pushes are as fast from any host memory, so there are no buffers.
        """
        ...

    def staging(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory from which pushes are fastest (page-locked on CUDA): uint8, (nbytes,), aligned."""
        ...


@runtime_checkable
class CountsPeak(Protocol):
    """What a :class:`Device` may also have: its allocator counts the highest number of bytes in use.

    The working memory of devices without it is measured by polling :meth:`Device.allocated`.
    """

    def reset_peak(self) -> int:
        """Start to count, and return the bytes that are in use now."""
        ...

    def peak(self) -> int:
        """Return the highest number of bytes in use since :meth:`reset_peak`."""
        ...


@runtime_checkable
class CachesMemory(Protocol):
    """What a :class:`Device` may also have: its allocator keeps freed memory, which other programs then cannot use."""

    def free_cache(self) -> None:
        """Return the memory that is kept but not in use to the system, on the device and for copies.

        It waits for the device, and the next allocations are slow, so only call it to give memory back.
        """
        ...


def free_cache(device: Device) -> None:
    """Return the device's unused memory to the system, if its allocator keeps any."""
    if isinstance(device, CachesMemory):
        device.free_cache()


def shares_host_memory(device: Device) -> bool:
    """Whether the device's memory and host memory are the same bytes, so that each byte must be counted once.

    A device says so by an attribute ``shares_host_memory``, which it may lack.
    """
    return bool(getattr(device, "shares_host_memory", False))


def wants_one_thread(device: Device) -> bool:
    """Whether only one thread at a time may use the device. A thread that only loads weights uses it, too.

    A device says so by an attribute ``wants_one_thread``, which it may lack.
    """
    return bool(getattr(device, "wants_one_thread", False))
