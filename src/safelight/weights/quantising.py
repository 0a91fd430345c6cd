"""Quantises weights for compact files: block forms of GGUF, and fp8 with a scale for each tensor.

The block forms are quantised as ``gguf.quants`` does, bit for bit: the largest number of a block gives its scale.
Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from safelight.files.blocks import BLOCKS

FP8 = "F8_E4M3"
LARGEST_FP8 = 448.0
"""The largest number of E4M3."""


def quantise_blocks(form: str, values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of blocks, uint8, one axis.

    ``form``: one of :data:`safelight.files.blocks.WRITTEN`.
    ``values``: fp32, contiguous; as many numbers as whole blocks have, in any shape.
    """
    return _QUANTISE[form](values.view(-1, BLOCKS[form].elements)).view(-1)


def quantise_fp8(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return numbers in E4M3, and the scale by which they are multiplied. ``values``: fp32."""
    largest = values.abs().max().item()
    scale = torch.tensor(largest / LARGEST_FP8 if largest else 1.0, dtype=torch.float32).item()
    return (values / scale).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scale


def _half_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Return one number of each block as fp16, as bytes (blocks, 2)."""
    return scale.to(torch.float16).view(torch.uint8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _farthest(blocks: torch.Tensor) -> torch.Tensor:
    """Return the number of each block that is farthest from zero, with its sign, (blocks, 1)."""
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Pack the lower four bits of 32 numbers: those of the first half, and above them those of the second."""
    lower, upper = (numbers & 0xF).view(-1, 2, 16).unbind(1)
    return lower | (upper << 4)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = _farthest(blocks) / -8
    numbers = (blocks * _inverse(scale) + 8.5).trunc_().clamp_(0, 15).to(torch.uint8)
    return torch.cat([_half_bytes(scale), _packed(numbers)], dim=1)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = _farthest(blocks) / -16
    numbers = (blocks * _inverse(scale) + 16.5).trunc_().clamp_(0, 31).to(torch.uint8)
    bits = (numbers >> 4).view(-1, 4, 8)
    fifth = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return torch.cat([_half_bytes(scale), fifth, _packed(numbers)], dim=1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    # Half is rounded away from zero; torch's round would go to the even number.
    whole = scaled.abs().floor()
    rounded = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()
    return torch.cat([_half_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], dim=1)


_QUANTISE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_0": _q4_0}
