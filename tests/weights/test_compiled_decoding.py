"""Compiled functions write the numbers of the other functions, bit for bit, in fp32 and rounded to bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.gguf_files import random_blocks

from safelight import extras
from safelight.files.blocks import BLOCKS
from safelight.files.header import Packing
from safelight.weights import compiled_decoding
from safelight.weights.block_decoding import decoding_of, dequantise
from safelight.weights.compiled_decoding import FORMS, compiled_for
from safelight.weights.manifest import ManifestTensor
from safelight.weights.packed_decoding import LARGE_SCALE

if "compiled" not in extras.installed():
    pytest.skip("numba is not installed", allow_module_level=True)

COUNT = 1000


def blocks_of(form: str) -> torch.Tensor:
    if form in BLOCKS:
        return torch.from_numpy(random_blocks(form, COUNT, np.random.default_rng(5))).view(-1)
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[every.view(torch.float8_e4m3fn).float().isfinite()]
    # The length is no multiple of the numbers that are computed at a time.
    return finite.repeat(7)[:-3].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5])
@pytest.mark.parametrize("form", FORMS["cpu"])
def test_numbers_are_the_same(form: str, scale: float, dtype: torch.dtype) -> None:
    if form in BLOCKS and scale != 1:
        pytest.skip("blocks have their own scales")
    raw = blocks_of(form)
    decoding = decoding_of(form, Packing(scale=scale) if scale != 1 else None)
    assert decoding is not None
    compiled = decoding.compiled["cpu"]()
    assert compiled is not None
    count = raw.numel() // decoding.nbytes * decoding.elements
    right, found = torch.empty(count), torch.empty(count, dtype=dtype)
    decoding.decode(raw, right, 0, torch.empty(0, dtype=torch.uint8))
    compiled(raw, found)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(integers), right.to(dtype).view(integers))
    assert len(found.unique()) > 100


@pytest.mark.parametrize("form", FORMS["cpu"])
@pytest.mark.parametrize("skipped", [0, 1, 16])
def test_nothing_else_is_written_wherever_the_numbers_begin(form: str, skipped: int) -> None:
    """Numbers that begin at a multiple of 32 bytes are stored past the cache."""
    raw = blocks_of(form)
    decoding = decoding_of(form, None)
    compiled = compiled_for(form, "cpu")
    assert decoding is not None
    assert compiled is not None
    count = raw.numel() // decoding.nbytes * decoding.elements
    right, around = torch.empty(count), torch.full((count + 64,), -7.0, dtype=torch.bfloat16)
    decoding.decode(raw, right, 0, torch.empty(0, dtype=torch.uint8))
    compiled(raw, around[skipped : skipped + count], scale=1.0)
    assert torch.equal(around[skipped : skipped + count], right.bfloat16())
    assert (torch.cat([around[:skipped], around[skipped + count :]]) == -7).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tensor_without_numbers(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensor = ManifestTensor("w", "Q8_0", (0,), Path(), 0, 0, False, "")
        dequantise(tensor, torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_ties_are_rounded_to_even() -> None:
    """0.0625 has products with E4M3's numbers whose upper halves are odd and even, and whose lower half is a tie."""
    codes = blocks_of("F8_E4M3")
    compiled = compiled_for("F8_E4M3", "cpu")
    assert compiled is not None
    # 1 + 2⁻⁸ times 1 lies between two bf16 numbers.
    for scale in (1 + 2**-8, 1 + 3 * 2**-8):
        out = torch.empty(len(codes), dtype=torch.bfloat16)
        compiled(codes, out, scale=scale)
        assert torch.equal(out, (codes.view(torch.float8_e4m3fn).float() * torch.tensor(scale)).bfloat16())


def test_a_huge_scale_is_left_to_the_other_functions() -> None:
    decoding = decoding_of("F8_E4M3", Packing(scale=LARGE_SCALE))
    assert decoding is not None
    assert not decoding.compiled


def test_without_numba_the_other_functions_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed", tuple)
    compiled_decoding.compiled_for.cache_clear()
    try:
        assert compiled_for("Q4_K", "cpu") is None
    finally:
        compiled_decoding.compiled_for.cache_clear()
