"""The bytes of a component, resident on a device: one slab, and a view of it for every tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from safelight.devices.pool import Slab, SlabPool, aligned
from safelight.devices.transfer import Read, read_all
from safelight.weights.manifest import ComponentManifest


@dataclass(eq=False)
class WeightSet:
    """A component's tensors by the module's names, in their final dtype, each at a multiple of 64 bytes. Read-only.

    ``digest`` is the component's content digest; ``nbytes`` the slab's bytes.
    """

    digest: str
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]
    slab: Slab
    spoiled: bool = False
    """Somebody wrote into them: they are dropped when their last lease ends."""

    @property
    def nbytes(self) -> int:
        return self.slab.nbytes


def resident_bytes(component: ComponentManifest, dtype: torch.dtype) -> int:
    """Bytes of the slab that a component takes in ``dtype``."""
    return sum(aligned(torch.Size(tensor.shape).numel() * dtype.itemsize) for tensor in component.tensors)


def load(component: ComponentManifest, dtype: torch.dtype, pool: SlabPool, threads: int) -> WeightSet:
    """Read, verify and cast a component into a slab of the pool.

    Raises IntegrityError when the bytes are not the manifest's; the slab is given back then.
    """
    slab = pool.take(resident_bytes(component, dtype))
    tensors: dict[str, torch.Tensor] = {}
    try:
        reads: list[Read] = []
        at = 0
        for t in component.tensors:
            size = torch.Size(t.shape).numel() * dtype.itemsize
            target = slab.base[at : at + size].view(dtype).view(t.shape)
            at += aligned(size)
            tensors[t.name] = target
            reads.append(Read(t.name, t.path, t.offset, t.nbytes, t.dtype, t.transpose, t.xxh3, target))
        read_all(reads, threads)
    except BaseException:
        tensors.clear()
        reads = []
        target = None
        pool.give(slab)
        raise
    return WeightSet(component.digest, dtype, tensors, slab)
