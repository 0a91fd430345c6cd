"""Dequantises the packed forms of safetensors files to fp32, on any device.

``raw``: uint8, flat: bytes of whole blocks. ``out``: fp32, flat, contiguous: their numbers; it is written.
The numbers are those of comfy-kitchen and bitsandbytes in fp32, bit for bit, except rotated int8: comfy-kitchen rotates
by a product of matrices, whose sums have no fixed order.
Source: comfy_kitchen/backends/eager/quantization.py and comfy_kitchen/tensor/int8_utils.py of
https://github.com/Comfy-Org/comfy-kitchen; bitsandbytes/backends/default/ops.py of
https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from safelight.devices.transfer import DTYPES
from safelight.files.header import Beside, Packing
from safelight.files.packing import SWIZZLED_COLUMNS, SWIZZLED_ROWS, TILE

LARGE_SCALE = 1e30
"""A product with a larger scale could become infinite before it is complete."""

ROW_SCALE = "row_scale"
TILE_SCALE = "tile_scale"
GROUP_SCALE = "group_scale"
COLUMN_SCALE = "column_scale"
ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP = "absmax", "map", "nested_absmax", "nested_map"

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXPONENT_AT = 23
"""The place of the exponent in the bits of fp32."""


@dataclass(frozen=True, slots=True)
class PackedDecoder:
    """Dequantises blocks of one tensor. ``form``: the tensor's dtype."""

    form: str
    packing: Packing

    def __call__(self, raw: torch.Tensor, out: torch.Tensor, first: int, beside: torch.Tensor) -> None:
        """Dequantise blocks.

        ``first``: the number of the first block within the tensor.
        ``beside``: uint8, flat: the bytes of the tensors beside, one after the other.
        """
        parts = {one.kind: (at, one) for at, one in _places(self.packing)}
        values = {kind: _values(beside, at, one) for kind, (at, one) in parts.items()}
        blocks = out.view(-1, self.packing.elements)
        at = self.packing.first + first
        if self.form in ("NF4", "FP4"):
            _four_bits(raw, out, values[MAP])
            blocks.mul_(self._maxima(values, at, len(blocks)))
            return
        _NUMBERS[self.form](raw, out)
        if GROUP_SCALE in values:
            self._scale_groups(blocks, values[GROUP_SCALE], at)
        elif TILE_SCALE in values:
            _scale_tiles(blocks, values[TILE_SCALE].float(), at)
        else:
            if ROW_SCALE in values:
                blocks.mul_(values[ROW_SCALE].float().view(-1, 1)[at : at + len(blocks)])
            if self.packing.scale is not None:
                blocks.mul_(self.packing.scale)
        if self.form == "INT8" and self.packing.group:
            rotate_groups(blocks, self.packing.group)
        if COLUMN_SCALE in values:
            blocks.mul_(values[COLUMN_SCALE].float().view(1, -1))

    def _maxima(self, values: Mapping[str, torch.Tensor], first: int, count: int) -> torch.Tensor:
        """Return the scale of each block of NF4 or FP4, fp32, (blocks, 1)."""
        absmax = values[ABSMAX].view(-1)[first : first + count]
        if NESTED_ABSMAX in values:
            groups = torch.arange(first, first + count, device=absmax.device) // max(self.packing.nested, 1)
            absmax = values[NESTED_MAP][absmax.int()] * values[NESTED_ABSMAX].view(-1)[groups]
            absmax = absmax + self.packing.offset
        return absmax.view(-1, 1)

    def _scale_groups(self, rows: torch.Tensor, stored: torch.Tensor, first: int) -> None:
        size = self.packing.group
        scales = _unswizzled(stored.view(torch.uint8), first, len(rows), rows.shape[1] // size)
        if self.form == "MXFP8":
            wide = (scales.to(torch.int32) << _EXPONENT_AT).view(torch.float32)
        else:
            whole = 1.0 if self.packing.scale is None else self.packing.scale
            wide = scales.view(torch.float8_e4m3fn).float() * whole
        rows.view(len(rows), -1, size).mul_(wide.unsqueeze(-1))


@lru_cache(maxsize=4096)
def _places(packing: Packing) -> tuple[tuple[int, Beside], ...]:
    """Return the tensors beside with the offset of each within their bytes."""
    found: list[tuple[int, Beside]] = []
    at = 0
    for one in packing.beside:
        found.append((at, one))
        at += one.nbytes
    return tuple(found)


def _values(beside: torch.Tensor, at: int, tensor: Beside) -> torch.Tensor:
    """Return the numbers of a tensor beside, flat, in its dtype. An exponent's dtype (F8_E8M0) is uint8."""
    dtype = DTYPES.get(tensor.dtype, torch.uint8)
    part = beside[at : at + tensor.nbytes]
    # A view in a wider dtype must begin at a multiple of its size.
    return (part.clone() if part.storage_offset() % dtype.itemsize else part).view(dtype)


def _unswizzled(stored: torch.Tensor, first: int, count: int, columns: int) -> torch.Tensor:
    """Return the scales of ``count`` rows, uint8, (rows, columns), from cuBLAS's order.

    There, tiles of 128 × 4 scales follow each other. A tile has 32 rows of 16: the scales of every 32nd row.
    Source: https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout.
    """
    across = -(-columns // SWIZZLED_COLUMNS)
    tiles = stored.view(-1, across, SWIZZLED_ROWS // 4, 4, SWIZZLED_COLUMNS)
    begin, end = first // SWIZZLED_ROWS, -(-(first + count) // SWIZZLED_ROWS)
    rows = tiles[begin:end].permute(0, 3, 2, 1, 4).reshape(-1, across * SWIZZLED_COLUMNS)
    skipped = first - begin * SWIZZLED_ROWS
    return rows[skipped : skipped + count, :columns].contiguous()


def _scale_tiles(rows: torch.Tensor, scales: torch.Tensor, first: int) -> None:
    """Multiply by a scale for each 128 × 128 numbers."""
    across = -(-rows.shape[1] // TILE)
    numbers = torch.arange(first, first + len(rows), device=rows.device) // TILE
    of_rows = scales.view(-1, across)[numbers]
    rows.mul_(of_rows.repeat_interleave(TILE, dim=1)[:, : rows.shape[1]])


def rotate_groups(rows: torch.Tensor, size: int) -> None:
    """Multiply each group of ``size`` numbers of a row by ConvRot's matrix, in place. It is its own inverse.

    The matrix is the Kronecker product of 4 × 4 matrices, divided by the root of its size. So each step combines four
    numbers, always in the same order.
    Source: https://arxiv.org/abs/2512.03673.
    """
    step = 1
    while step < size:
        first, second, third, fourth = rows.view(-1, 4, step).unbind(1)
        plus, minus = first + second, first - second
        total, difference = third + fourth, third - fourth
        torch.add(plus, difference, out=first)
        torch.sub(plus, difference, out=second)
        torch.add(minus, total, out=third)
        torch.sub(total, minus, out=fourth)
        step *= 4
    # A power of two is exact.
    rows.mul_(size**-0.5)


def _four_bits(raw: torch.Tensor, out: torch.Tensor, table: torch.Tensor) -> None:
    """Look up two numbers for each byte, that of the upper half first. ``table``: fp32, 16 numbers."""
    codes = torch.arange(256, device=raw.device)
    pairs = torch.stack([table[codes >> 4], table[codes & 0xF]], dim=1)
    torch.index_select(pairs, 0, raw.int(), out=out.view(-1, 2))


def _nvfp4(raw: torch.Tensor, out: torch.Tensor) -> None:
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)), dtype=torch.float32, device=raw.device)
    _four_bits(raw, out, table)


def _plain(dtype: torch.dtype, raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(raw.view(dtype))


def _int8(raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(raw.view(torch.int8))


def fp8_e5m2(raw: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """Dequantise F8_E5M2. These are the upper bytes of fp16 numbers. torch's own conversion is slower."""
    out.copy_((raw.to(torch.int16) << 8).view(torch.float16))
    if scale != 1:
        out.mul_(scale)


def fp8_e4m3(raw: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """Dequantise F8_E4M3.

    With the bits at the places of fp16's, each number is 256 times too small, because the exponents' biases differ.
    There is no NaN: files with one are refused. torch's own conversion is slower.
    """
    words = raw.to(torch.int16)
    out.copy_((((words & 0x80) << 8) | ((words & 0x7F) << 7)).view(torch.float16))
    if scale < LARGE_SCALE:
        # A power of two is exact, so both factors round once.
        out.mul_(256 * scale)
    else:
        out.mul_(256).mul_(scale)


_NUMBERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    **{name: partial(_plain, DTYPES[name]) for name in ("F32", "F16", "BF16")},
    "INT8": _int8,
    "F8_E4M3": fp8_e4m3,
    "F8_E5M2": fp8_e5m2,
    "MXFP8": fp8_e4m3,
    "NVFP4": _nvfp4,
}
