"""The block forms of GGUF: a row of a tensor is stored as blocks of quantised numbers, and each block has its scales.

Source: ggml's ``ggml-common.h``, and ``GGML_QUANT_SIZES`` of the package gguf. docs/forms.md explains each form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUPERBLOCK = 256
"""Numbers in a block of the K forms (ggml's ``QK_K``)."""


@dataclass(frozen=True, slots=True)
class BlockForm:
    """How a block is stored.

    ``elements``: numbers in a block.
    ``nbytes``: bytes of a block.
    ``scales``: offsets in bytes of the fp16 numbers in a block. All other bytes are integers.
    """

    elements: int
    nbytes: int
    scales: tuple[int, ...]


BLOCKS: Mapping[str, BlockForm] = {
    "Q4_0": BlockForm(32, 18, (0,)),
    "Q4_1": BlockForm(32, 20, (0, 2)),
    "Q5_0": BlockForm(32, 22, (0,)),
    "Q5_1": BlockForm(32, 24, (0, 2)),
    "Q8_0": BlockForm(32, 34, (0,)),
    "Q2_K": BlockForm(SUPERBLOCK, 84, (80, 82)),
    "Q3_K": BlockForm(SUPERBLOCK, 110, (108,)),
    "Q4_K": BlockForm(SUPERBLOCK, 144, (0, 2)),
    "Q5_K": BlockForm(SUPERBLOCK, 176, (0, 2)),
    "Q6_K": BlockForm(SUPERBLOCK, 210, (208,)),
    "IQ4_NL": BlockForm(32, 18, (0,)),
    "IQ4_XS": BlockForm(SUPERBLOCK, 136, (0,)),
}
"""The forms that Safelight reads, by ggml's names."""

WRITTEN = ("Q8_0", "Q5_0", "Q4_0")
"""The forms that Safelight writes."""

COMPACT_FORMS = (*(form.lower() for form in WRITTEN), "fp8")
"""The forms of compact files, as users name them: blocks in a GGUF file, or fp8 in a safetensors file."""


def compact_file_name(name: str, form: str) -> str:
    """Return the name of a compact file. ``name``: of the model that it is made from."""
    return f"{name}-{form}.{'safetensors' if form == 'fp8' else 'gguf'}"
