"""Dequantises common forms on a CPU with functions that numba compiles: ten times as fast as separate operations.

A function computes each number in fp32 in the order of :mod:`safelight.weights.block_decoding`, rounds it once, and
writes it. So the results are equal bit for bit, and nothing is written to memory in between.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np
import torch

from safelight import extras
from safelight.files.blocks import BLOCKS, SUPERBLOCK


class Compiled(Protocol):
    """Dequantises blocks."""

    def __call__(self, raw: torch.Tensor, out: torch.Tensor, *, scale: float) -> None:
        """Dequantise blocks in host memory.

        ``raw``: their bytes, uint8, flat.
        ``out``: where to write their numbers, flat, fp32 or bf16.
        ``scale``: of fp8; block forms have their own scales.
        """
        ...


FORMS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F8_E4M3")


@cache
def compiled_for(form: str) -> Compiled | None:
    """Return the function for a form; None if there is none, or numba is not installed."""
    if form not in FORMS or "compiled" not in extras.installed():
        return None
    from safelight.weights.decoding_kernels import KERNELS

    kernel, block = KERNELS[form], BLOCKS.get(form)

    def decode(raw: torch.Tensor, out: torch.Tensor, *, scale: float) -> None:
        wide = out.dtype == torch.float32
        source, target = raw.numpy(), out.view(torch.int32 if wide else torch.int16).numpy()
        target = target.view(np.uint32 if wide else np.uint16)
        # Rows of 256 numbers, then the rest, whose length is any number of blocks.
        nbytes, elements = (1, 1) if block is None else (block.nbytes, block.elements)
        per_row = SUPERBLOCK // elements
        whole = len(source) // (nbytes * per_row) * per_row
        rest = len(source) // nbytes - whole
        for first, count, width in ((0, whole, per_row), (whole, rest, rest)):
            if count:
                rows = source[first * nbytes : (first + count) * nbytes].reshape(-1, width * nbytes)
                numbers = target[first * elements : (first + count) * elements].reshape(-1, width * elements)
                kernel(rows, numbers, _half_table(), np.float32(scale))

    return decode


@cache
def _half_table() -> np.ndarray:
    """Return the fp32 number of each fp16 number's bits."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
