"""Tensors in a slab: a view for each, at a multiple of 64 bytes, and the reads that fill them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from safelight.devices.base import aligned
from safelight.devices.transfer import Read
from safelight.weights.manifest import ComponentManifest, ManifestTensor


def resident_bytes(component: ComponentManifest, dtype: torch.dtype) -> int:
    """Bytes that a component takes in ``dtype``."""
    return sum(aligned(torch.Size(tensor.shape).numel() * dtype.itemsize) for tensor in component.tensors)


def views(base: torch.Tensor, tensors: Iterable[ManifestTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Views of ``base`` (uint8, aligned) for the tensors, one behind another, by the module's names.

    Each holds the storage once: what autograd would keep of the way to it would count as another holder.
    """
    out: dict[str, torch.Tensor] = {}
    at = 0
    for tensor in tensors:
        size = torch.Size(tensor.shape).numel() * dtype.itemsize
        out[tensor.name] = base[at : at + size].view(dtype).view(tensor.shape).detach()
        at += aligned(size)
    return out


def reads(tensors: Iterable[ManifestTensor], targets: dict[str, torch.Tensor], prove: bool) -> list[Read]:
    """The reads that fill ``targets`` from the manifest's files, hashed against it; ``prove`` see :class:`Read`."""
    return [
        Read(t.name, t.path, t.offset, t.nbytes, t.dtype, t.transpose, t.xxh3, targets[t.name], prove) for t in tensors
    ]
