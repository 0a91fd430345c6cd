"""Dequantises common forms with compiled functions, many times as fast as separate operations.

On a CPU, numba compiles them; on a GPU of NVIDIA or AMD, Triton does, which comes with torch there. A function computes
each number in fp32 in the order of :mod:`safelight.weights.block_decoding`, rounds it once, and writes it. So the
results are equal bit for bit, and nothing is written to memory in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch

from safelight import extras
from safelight.files.blocks import BLOCKS, SUPERBLOCK
from safelight.logs import Log

_log = Log(__name__)


class Compiled(Protocol):
    """Dequantises blocks."""

    def __call__(self, raw: torch.Tensor, out: torch.Tensor, *, scale: float) -> None:
        """Dequantise blocks.

        ``raw``: their bytes, uint8, flat.
        ``out``: where to write their numbers, flat, fp32 or bf16, on the same device.
        ``scale``: of fp8; block forms have their own scales.
        """
        ...


FORMS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F8_E4M3"),
    "cuda": (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("F8_E4M3", "F8_E5M2"),
    ),
}
"""By torch's name of the type of device."""


@cache
def compiled_for(form: str, device: str) -> Compiled | None:
    """Return the function for a form on a type of device; None if there is none, or what compiles it is missing."""
    if form not in FORMS[device]:
        return None
    return _on_cpu(form) if device == "cpu" else _on_gpu(form, torch.device(device))


def _on_gpu(form: str, place: torch.device) -> Compiled | None:
    if find_spec("triton") is None:
        return None
    from safelight.weights.cuda_decoding_kernels import decode, first_difference

    # Triton needs a C compiler, and each of its versions compiles in another way. So its function is tried first.
    try:
        wrong = first_difference(form, place)
    except Exception as error:  # noqa: BLE001 - whatever it raises, the other functions compute the same numbers
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _log.warning("Triton cannot dequantise here; torch does, more slowly", form=form, why=wrong)
        return None
    return partial(decode, form)


def _on_cpu(form: str) -> Compiled | None:
    if "compiled" not in extras.installed():
        return None
    from safelight.weights.decoding_kernels import ALIGNMENT, KERNELS, finish

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
                aligned = not (numbers.ctypes.data % ALIGNMENT or numbers.strides[0] % ALIGNMENT)
                kernel(rows, numbers, _half_table(), np.float32(scale), aligned)
        finish()

    return decode


@cache
def _half_table() -> np.ndarray:
    """Return the fp32 number of each fp16 number's bits."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
