"""Dequantised numbers equal those of gguf and diffusers, bit for bit, in fp32."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf import utils as theirs
from gguf.quants import dequantize
from support.gguf_files import kind_of, random_blocks
from support.scale import thinned

from safelight.devices import transfer
from safelight.devices.transfer import Read, read_all
from safelight.files.blocks import BLOCKS
from safelight.files.header import Packing
from safelight.weights.block_decoding import decode, decoding_of

WRITTEN_BY_GGML = Path(__file__).parents[1] / "data/ggml_blocks.json"

COUNT = 2100
"""More blocks than a chunk of 512 Ki numbers has, for the forms with 256 of them."""


@pytest.fixture(params=BLOCKS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def raw(form: str) -> np.ndarray:
    return random_blocks(form, COUNT, np.random.default_rng(3))


ERRORS = {
    "Q2_K": 0.32,
    "Q3_K": 0.18,
    "Q4_K": 0.09,
    "Q5_K": 0.05,
    "Q6_K": 0.025,
    "IQ4_NL": 0.09,
    "IQ4_XS": 0.09,
    "Q4_0": 0.1,
    "Q4_1": 0.09,
    "Q5_0": 0.05,
    "Q5_1": 0.045,
    "Q8_0": 0.008,
}
"""The largest error of each form: the norm of the errors by that of the numbers."""


def test_blocks_that_ggml_wrote_have_the_numbers_that_it_was_given(form: str) -> None:
    """The first row of ``torch.randn(64, 256) * 0.05`` with the seed 7, which the ``convert`` of the package
    stable-diffusion-cpp-python 0.4.7 wrote in each form with ggml's own functions.
    """
    raw = base64.b64decode(json.loads(WRITTEN_BY_GGML.read_text())[form])
    given = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))[0] * 0.05
    out = torch.empty(256)
    decode(form, torch.frombuffer(bytearray(raw), dtype=torch.uint8), out)
    error = ((out - given).norm() / given.norm()).item()
    assert ERRORS[form] / 3 < error < ERRORS[form]


def test_the_numbers_are_those_of_gguf(form: str, raw: np.ndarray) -> None:
    out = torch.empty(COUNT * BLOCKS[form].elements)
    decode(form, torch.from_numpy(raw).view(-1), out)
    right = torch.from_numpy(dequantize(raw, kind_of(form))).view(-1)
    assert torch.equal(out.view(torch.int32), right.view(torch.int32))
    assert len(out.unique()) > 100


def test_the_numbers_are_those_of_diffusers(form: str, raw: np.ndarray) -> None:
    """diffusers computes in fp16 by default; with fp32 its numbers are the same."""
    function = theirs.dequantize_functions.get(kind_of(form))
    if function is None:
        pytest.skip(f"diffusers does not read {form}")
    block = BLOCKS[form]
    right = function(torch.from_numpy(raw), block.elements, block.nbytes, dtype=torch.float32)
    out = torch.empty(COUNT * block.elements)
    decode(form, torch.from_numpy(raw).view(-1), out)
    assert torch.equal(out, right.reshape(-1))


@pytest.mark.parametrize("dtype", thinned([torch.bfloat16, torch.float32, torch.float16]))
def test_reading_rounds_once(form: str, raw: np.ndarray, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    path.write_bytes(b"before" + raw.tobytes())
    target = torch.empty(COUNT, BLOCKS[form].elements, dtype=dtype)
    sum_of_file = transfer.checksum_of(torch.from_numpy(raw))
    read = Read("w", path, 6, raw.nbytes, form, False, sum_of_file, target, blocks=decoding_of(form, None))
    [produced] = read_all([read], 1)
    right = torch.from_numpy(dequantize(raw, kind_of(form))).to(dtype)
    assert torch.equal(target, right)
    assert produced == transfer.checksum_of(right)


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_fp8(name: str, dtype: torch.dtype, scale: float | None, tmp_path: Path) -> None:
    # All numbers besides NaN and infinity.
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = codes[codes.float().isfinite()]
    stored = every.view(torch.uint8).repeat(30)[:6300].view(7, 900).view(dtype)
    path = tmp_path / "numbers"
    path.write_bytes(stored.view(torch.uint8).numpy().tobytes())
    target = torch.empty(7, 900, dtype=torch.bfloat16)
    sum_of_file = transfer.checksum_of(stored.view(torch.uint8))
    blocks = decoding_of(name, None if scale is None else Packing(scale=scale))
    read_all([Read("w", path, 0, 6300, name, False, sum_of_file, target, blocks=blocks)], 1)
    right = stored.float() if scale is None else stored.float() * torch.tensor(scale)
    assert torch.equal(target, right.bfloat16())
