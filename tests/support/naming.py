"""The tensors of a component under the names that files have, and headers of files that do not exist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from safelight.families.components import Config
from safelight.files.header import ITEM_BYTES, Header, TensorInfo

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def on_meta(config: Config) -> dict[str, torch.Tensor]:
    """Return a component's tensors without their bytes, under the names of its module."""
    return {row.name: torch.empty(row.shape, device="meta") for row in config.rows()}


def in_files(config: Config, state: Mapping[str, torch.Tensor], which: int) -> dict[str, torch.Tensor]:
    """Return a component's tensors under names that files have: fused, transposed and swapped as the files have them.

    ``state``: the tensors under any of their names that are not fused. Those that the component does not have keep
    their names.
    ``which``: index among the names of each tensor. The last name counts for a tensor with fewer names.
    """
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    used: set[str] = set()
    for row in config.rows():
        name = next(source.name for source in row.sources if source.name in state)
        source, tensor = row.sources[min(which, len(row.sources) - 1)], state[name]
        used.update(source.name for source in row.sources)
        if source.transpose:
            tensor = tensor.t()
        if source.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if source.flattened:
            tensor = tensor.flatten()
        if ".mid.attn_1." in source.name and tensor.ndim == 2:
            # LDM's VAE computes its attention with 1×1 convolutions.
            tensor = tensor[:, :, None, None]
        parts.setdefault(source.name, []).append((source.part(row.shape[0])[0], tensor))
    fused = {name: [tensor for _, tensor in sorted(some, key=lambda one: one[0])] for name, some in parts.items()}
    named = {name: torch.cat(some) if len(some) > 1 else some[0].contiguous() for name, some in fused.items()}
    return named | {name: tensor for name, tensor in state.items() if name not in used}


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def header_of(tensors: Mapping[str, torch.Tensor], path: Path = Path("made-up.safetensors")) -> Header:
    """Return the header of a safetensors file with these tensors. They may be on the meta device."""
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for name, tensor in tensors.items():
        dtype = DTYPES[tensor.dtype]
        nbytes = math.prod(tensor.shape) * ITEM_BYTES[dtype]
        infos[name] = TensorInfo(name, dtype, tuple(tensor.shape), path, offset, nbytes)
        offset += nbytes
    return Header(path, "safetensors", infos)
