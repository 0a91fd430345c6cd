"""Writes GGUF files with the package gguf, and quantised tensors for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from safelight.files.blocks import BLOCKS
from safelight.files.gguf import MOST_AXES, ORIGINAL_SHAPE

Stored = tuple[str, np.ndarray, tuple[int, ...]]
"""A form, the bytes or numbers as the file has them, and the shape of the tensor."""


def kind_of(form: str) -> Any:
    return getattr(GGMLQuantizationType, form)


def random_blocks(form: str, count: int, generator: np.random.Generator, size: float = 1.0) -> np.ndarray:
    """Return valid blocks with random bytes, (count, bytes): minima and upper bits of scales are there, too.

    ``size``: about that of the largest numbers.
    """
    block = BLOCKS[form]
    raw = generator.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    scales = generator.normal(0, 1, (count, len(block.scales))).astype(np.float16)
    for number, at in enumerate(block.scales):
        raw[:, at : at + 2] = scales[:, number : number + 1].view(np.uint8)
    largest = np.abs(dequantize(raw, kind_of(form))).max()
    for number, at in enumerate(block.scales):
        smaller = (scales[:, number : number + 1].astype(np.float32) * size / largest).astype(np.float16)
        raw[:, at : at + 2] = smaller.view(np.uint8)
    return raw


def stored(form: str, tensor: torch.Tensor, generator: np.random.Generator) -> Stored:
    """Return a tensor in a form, as far as its size allows, else in fp32.

    The forms that gguf cannot write have random numbers of about the same size.
    """
    shape, values = tuple(tensor.shape), tensor.float().contiguous().numpy()
    if form not in BLOCKS:
        return form, values.astype(np.float16) if form == "F16" else values, shape
    if values.ndim < 2 or values.size % BLOCKS[form].elements:
        return "F32", values, shape
    rows = values.reshape(-1, BLOCKS[form].elements)
    try:
        return form, quantize(rows, kind_of(form)), shape
    except NotImplementedError:
        return form, random_blocks(form, len(rows), generator, float(np.abs(values).max())), shape


def dequantized(one: Stored) -> torch.Tensor:
    """Return the numbers of a stored tensor, as gguf computes them."""
    form, raw, shape = one
    values = raw.astype(np.float32) if form not in BLOCKS else dequantize(raw, kind_of(form))
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(shape)


def write(path: Path, tensors: Mapping[str, Stored], **metadata: str) -> None:
    """Write a file. A tensor whose rows are no whole blocks gets another shape, and its own in the metadata."""
    writer = GGUFWriter(path, metadata.pop("architecture", "any"))
    for key, value in metadata.items():
        writer.add_string(key, value)
    for name, (form, raw, shape) in tensors.items():
        data = raw
        if len(shape) > MOST_AXES:
            writer.add_array(ORIGINAL_SHAPE + name, list(shape))
            data = raw.reshape(-1)
        elif form in BLOCKS:
            if shape[-1] % BLOCKS[form].elements:
                writer.add_array(ORIGINAL_SHAPE + name, list(shape))
            else:
                data = raw.reshape(*shape[:-1], -1)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind_of(form) if form in BLOCKS else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
