"""Tensors in a slab: a view for each tensor, at a multiple of 64 bytes, and the reads that fill the views."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from safelight.devices.base import aligned
from safelight.devices.transfer import Read
from safelight.weights.manifest import ComponentManifest, ManifestTensor


def bytes_needed(component: ComponentManifest, dtype: torch.dtype) -> int:
    """Return the bytes that a component needs in ``dtype``."""
    return sum(aligned(torch.Size(tensor.shape).numel() * dtype.itemsize) for tensor in component.tensors)


def views(base: torch.Tensor, tensors: Iterable[ManifestTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Create views of ``base`` (uint8, aligned) for consecutive tensors, by the module's names.

    The views are detached. Otherwise autograd's references would count in ``Slab.holders``, and the slab would seem to
    be in use.
    """
    out: dict[str, torch.Tensor] = {}
    at = 0
    for tensor in tensors:
        size = torch.Size(tensor.shape).numel() * dtype.itemsize
        out[tensor.name] = base[at : at + size].view(dtype).view(tensor.shape).detach()
        at += aligned(size)
    return out


def reads(tensors: Iterable[ManifestTensor], targets: dict[str, torch.Tensor], hash_result: bool) -> list[Read]:
    """Return the reads that fill ``targets`` from files and verify them. ``hash_result``: see :class:`Read`."""
    return [
        Read(
            t.name,
            t.path,
            t.offset,
            t.nbytes,
            t.dtype,
            t.transpose,
            t.xxh3,
            targets[t.name],
            hash_result,
            t.swap_halves,
        )
        for t in tensors
    ]
