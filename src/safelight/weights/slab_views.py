"""Tensors in a slab: a view for each tensor, at a multiple of 64 bytes, and the reads that fill the views."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from safelight.devices.base import aligned
from safelight.devices.transfer import Blocks, Read
from safelight.families.components import Config
from safelight.weights.block_decoding import decoding_of
from safelight.weights.manifest import ComponentManifest, ManifestTensor

COMPACT = torch.uint8
"""The dtype of a tensor that is in memory as its file stores it: its bytes."""


def dtypes_of(
    component: ComponentManifest,
    tensors: Iterable[ManifestTensor],
    dtype: torch.dtype,
    stays_compact: Callable[[ManifestTensor], bool],
) -> tuple[torch.dtype, ...]:
    """Return the dtypes of tensors in memory.

    ``tensors``: of the component.
    ``dtype``: the one that the component computes in. Some tensors stay in fp32 (:meth:`Config.keeps_fp32`).
    ``stays_compact``: says of a tensor whether it is in memory as its file stores it.
    """
    return tuple(
        COMPACT if stays_compact(tensor) else computing_dtype(component.config, tensor.name, dtype)
        for tensor in tensors
    )


def computing_dtype(config: Config, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor is computed with. ``dtype``: that of the component."""
    return torch.float32 if config.keeps_fp32(name) else dtype


def bytes_needed(tensors: Iterable[ManifestTensor], dtypes: Iterable[torch.dtype]) -> int:
    """Return the bytes that consecutive tensors need in a slab."""
    return sum(aligned(_nbytes(tensor, dtype)) for tensor, dtype in zip(tensors, dtypes, strict=True))


def _nbytes(tensor: ManifestTensor, dtype: torch.dtype) -> int:
    return tensor.stored_nbytes if dtype == COMPACT else torch.Size(tensor.shape).numel() * dtype.itemsize


def views(
    base: torch.Tensor, tensors: Iterable[ManifestTensor], dtypes: Iterable[torch.dtype]
) -> dict[str, torch.Tensor]:
    """Create views of ``base`` (uint8, aligned) for consecutive tensors, by the module's names.

    ``dtypes``: of the tensors.

    The views are detached. Otherwise autograd's references would count in ``Slab.holders``, and the slab would seem to
    be in use.
    """
    out: dict[str, torch.Tensor] = {}
    at = 0
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        size = _nbytes(tensor, dtype)
        shape = (size,) if dtype == COMPACT else tensor.shape
        out[tensor.name] = base[at : at + size].view(dtype).view(shape).detach()
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
            "U8" if targets[t.name].dtype == COMPACT else t.dtype,
            t.transpose,
            t.xxh3,
            targets[t.name],
            hash_result,
            t.swap_halves,
            None if targets[t.name].dtype == COMPACT else _decoding_of(t),
            t.beside,
        )
        for t in tensors
    ]


def _decoding_of(tensor: ManifestTensor) -> Blocks | None:
    return decoding_of(tensor.dtype, tensor.packing, tensor.nbytes, torch.Size(tensor.shape).numel())
