"""The functions of :mod:`safelight.weights.compiled_decoding` for GPUs. Importing this module imports Triton.

Each function of a form computes one number of a block in fp32, in the order of
:mod:`safelight.weights.block_decoding`: ``block`` points to the bytes of the block, ``n`` is the number's place in it.
"""

# Triton reads the source of these functions. Their parameters have no types, and all forms have the same ones.
# ruff: noqa: ARG001, N803
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from safelight.files.blocks import BLOCKS
from safelight.files.header import Packing

# Triton has no types. It finds these names among the globals of a function.
triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

TILE = 1024
"""Numbers that one program computes."""


@triton.jit
def byte(block, at):
    return tl.load(block + at).to(tl.int32)


@triton.jit
def signed(block, at):
    return tl.load(block + at).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def half(block, at):
    bits = byte(block, at) | (byte(block, at + 1) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nibble(block, at, upper):
    """Return the upper four bits of a byte where ``upper`` is 1, else the lower ones."""
    return (byte(block, at) >> (4 * upper)) & 15


@triton.jit
def fifth_bit(block, at, n):
    return ((byte(block, at + n // 8) >> (n % 8)) & 1) << 4


@triton.jit
def q4_0(block, n, scale):
    return (nibble(block, 2 + n % 16, n // 16) - 8).to(tl.float32) * half(block, 0)


@triton.jit
def q4_1(block, n, scale):
    return nibble(block, 4 + n % 16, n // 16).to(tl.float32) * half(block, 0) + half(block, 2)


@triton.jit
def q5_0(block, n, scale):
    number = nibble(block, 6 + n % 16, n // 16) | fifth_bit(block, 2, n)
    return (number - 16).to(tl.float32) * half(block, 0)


@triton.jit
def q5_1(block, n, scale):
    number = nibble(block, 8 + n % 16, n // 16) | fifth_bit(block, 4, n)
    return number.to(tl.float32) * half(block, 0) + half(block, 2)


@triton.jit
def q8_0(block, n, scale):
    return signed(block, 2 + n) * half(block, 0)


@triton.jit
def q2_k(block, n, scale):
    packed = byte(block, 16 + 32 * (n // 128) + n % 32)
    number = ((packed >> (2 * (n % 128 // 32))) & 3).to(tl.float32)
    both = byte(block, n // 16)
    factor, least = half(block, 80) * (both & 15).to(tl.float32), half(block, 82) * (both >> 4).to(tl.float32)
    return number * factor - least


@triton.jit
def q3_k(block, n, scale):
    place, part = n % 128 // 32, n // 128
    lower = (byte(block, 32 + 32 * part + n % 32) >> (2 * place)) & 3
    # The offset is zero where the bit is set.
    missing = ((byte(block, n % 32) >> (4 * part + place)) & 1) ^ 1
    group = n // 16
    low = nibble(block, 96 + group % 8, group // 8)
    high = (byte(block, 104 + group % 4) >> (2 * (group // 4))) & 3
    factor = half(block, 108) * ((low | (high << 4)) - 32).to(tl.float32)
    return (lower - 4 * missing).to(tl.float32) * factor


@triton.jit
def scale_and_minimum(block, group):
    """Return the scale and the minimum of one of the eight groups of Q4_K and Q5_K."""
    one, other, both = byte(block, 4 + group % 4), byte(block, 8 + group % 4), byte(block, 12 + group % 4)
    factor = tl.where(group < 4, one & 0x3F, (both & 15) | ((one >> 2) & 0x30))
    least = tl.where(group < 4, other & 0x3F, (both >> 4) | ((other >> 2) & 0x30))
    return half(block, 0) * factor.to(tl.float32), half(block, 2) * least.to(tl.float32)


@triton.jit
def q4_k(block, n, scale):
    number = nibble(block, 16 + 32 * (n // 64) + n % 32, n // 32 % 2)
    factor, least = scale_and_minimum(block, n // 32)
    return number.to(tl.float32) * factor - least


@triton.jit
def q5_k(block, n, scale):
    lower = nibble(block, 48 + 32 * (n // 64) + n % 32, n // 32 % 2)
    upper = ((byte(block, 16 + n % 32) >> (n // 32)) & 1) << 4
    factor, least = scale_and_minimum(block, n // 32)
    return (lower | upper).to(tl.float32) * factor - least


@triton.jit
def q6_k(block, n, scale):
    place = n % 128
    lower = nibble(block, 64 * (n // 128) + place % 64, place // 64)
    upper = ((byte(block, 128 + 32 * (n // 128) + n % 32) >> (2 * (place // 32))) & 3) << 4
    return ((lower | upper) - 32).to(tl.float32) * (half(block, 208) * signed(block, 192 + n // 16))


@triton.jit
def f8_e4m3(block, n, scale):
    word = byte(block, 0)
    # With the bits at the places of fp16's, each number is 256 times too small.
    bits = ((word & 0x80) << 8) | ((word & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (256.0 * scale)


@triton.jit
def f8_e5m2(block, n, scale):
    return (byte(block, 0) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale


@triton.jit
def dequantise(
    raw, out, count, scale,
    NUMBER: tl.constexpr, ELEMENTS: tl.constexpr, NBYTES: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write ``count`` numbers. ``out``: int32 for fp32, int16 for bf16. ``NUMBER``: the function of the form."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = at < count
    inside = tl.where(there, at, 0)
    number = NUMBER(raw + inside // ELEMENTS * NBYTES, (inside % ELEMENTS).to(tl.int32), scale)
    bits = number.to(tl.uint32, bitcast=True)
    if WIDE:
        tl.store(out + at, bits.to(tl.int32, bitcast=True), there)
    else:
        # To the nearest bf16, ties to even: not each GPU has an instruction for it.
        tl.store(out + at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), there)


NUMBERS: Mapping[str, Any] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "F8_E4M3": f8_e4m3,
    "F8_E5M2": f8_e5m2,
}
"""The function of each form."""


def decode(form: str, raw: torch.Tensor, out: torch.Tensor, *, scale: float) -> None:
    """Dequantise whole blocks.

    ``raw``: their bytes, uint8, flat.
    ``out``: their numbers, fp32 or bf16, flat; it is written.
    ``scale``: of fp8.
    """
    elements, nbytes = (BLOCKS[form].elements, BLOCKS[form].nbytes) if form in BLOCKS else (1, 1)
    wide, count = out.dtype == torch.float32, out.numel()
    # A product and a sum must not become one operation: it rounds once, and the host rounds twice.
    dequantise[(triton.cdiv(count, TILE),)](
        raw, out.view(torch.int32 if wide else torch.int16), count, scale,
        NUMBERS[form], elements, nbytes, wide, TILE, enable_fp_fusion=False,
    )  # fmt: skip


def first_difference(form: str, place: torch.device) -> str:
    """Compare with the other functions on a GPU. Returns what is different, "" if nothing is."""
    from safelight.weights import block_decoding

    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (65 * 256,), dtype=torch.uint8, generator=generator)
    if form in BLOCKS:
        block = BLOCKS[form]
        raw = raw[: len(raw) // block.nbytes * block.nbytes].view(-1, block.nbytes)
        for at in block.scales:
            raw[:, at : at + 2] = torch.randn(len(raw), 1, generator=generator).half().view(torch.uint8)
    else:
        # Without infinity and NaN, which files may not have.
        raw = raw[(raw & 0x7F) < 0x7B]
    raw, scale = raw.reshape(-1).to(place), 0.3
    decoding = block_decoding.decoding_of(form, None if form in BLOCKS else Packing(scale=scale))
    assert decoding is not None
    right = torch.empty(len(raw) // decoding.nbytes * decoding.elements, device=place)
    decoding.decode(raw, right, 0, raw[:0])
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        made = torch.empty(right.shape, dtype=dtype, device=place)
        decode(form, raw, made, scale=scale)
        wrong = int((made.view(bits) != right.to(dtype).view(bits)).sum())
        if wrong:
            return f"{wrong} of {len(right)} numbers are different in {dtype}"
    return ""
