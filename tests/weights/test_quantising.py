"""Weights are quantised as the package gguf does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.gguf_files import kind_of

from safelight.files.blocks import BLOCKS, WRITTEN
from safelight.weights.block_decoding import decode
from safelight.weights.quantising import quantise_blocks, quantise_fp8

NUMBERS = st.floats(-60_000, 60_000, width=32, allow_subnormal=False)


@pytest.mark.parametrize("form", WRITTEN)
@given(blocks=arrays.arrays(np.float32, (3, 32), elements=NUMBERS))
def test_the_bytes_are_those_of_gguf(form: str, blocks: np.ndarray) -> None:
    raw = quantise_blocks(form, torch.from_numpy(blocks.copy()))
    with np.errstate(over="ignore", invalid="ignore"):
        assert raw.numpy().tobytes() == quantize(blocks, kind_of(form)).tobytes()


@pytest.mark.parametrize(("form", "most"), [("Q8_0", 0.006), ("Q5_0", 0.05), ("Q4_0", 0.1)])
def test_the_error_is_that_of_the_form(form: str, most: float) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    raw, back = quantise_blocks(form, values), torch.empty(values.numel())
    assert raw.numel() == values.numel() // BLOCKS[form].elements * BLOCKS[form].nbytes
    decode(form, raw, back)
    assert most / 2 < ((back - values.view(-1)).norm() / values.norm()).item() < most


def test_fp8_uses_its_whole_range() -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 1e-4
    stored, scale = quantise_fp8(values)
    assert stored.float().abs().max() == 448
    assert ((stored.float() * scale - values).norm() / values.norm()).item() < 0.03
    assert torch.equal(quantise_fp8(torch.zeros(2, 2))[0].float(), torch.zeros(2, 2))
