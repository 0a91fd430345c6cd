"""Packs weights as bitsandbytes and comfy-kitchen do, with their numbers in fp32, computed without Safelight.

The files that those programs wrote are in ``tests/data/packed_weights.json``; ``tests/weights/test_packed_decoding.py``
compares. Here the weights may have any size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from safelight.devices.transfer import Read, checksum_of, read_all
from safelight.files import safetensors
from safelight.files.header import TensorInfo
from safelight.files.packing import find_packed
from safelight.weights import manifest
from safelight.weights.digest import TensorDigester
from safelight.weights.layout import TensorLocation
from safelight.weights.manifest import ManifestTensor

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors by the ends of their names, and the numbers in fp32."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = (0.0, 0.005208333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 64
GROUP = 16
"""Numbers that are rotated together."""


def as_json(**settings: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1)


def _int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-127, 127).to(torch.int8)


def int8(values: torch.Tensor) -> Packed:
    scale = values.abs().max() / 127
    stored = _int8(values, scale)
    return {"weight": stored, "weight_scale": scale, "comfy_quant": as_json(format="int8_tensorwise")}, (
        stored.float() * scale
    )


def int8_rows(values: torch.Tensor) -> Packed:
    scale = _rows(values).abs().amax(1).clamp(min=1e-8) / 127
    shaped = scale.view(-1, *[1] * (values.ndim - 1))
    stored = _int8(values, shaped)
    beside = {"weight": stored, "weight_scale": shaped.clone()}
    return beside, stored.float() * shaped


def int8_rotated(values: torch.Tensor) -> Packed | None:
    if values.ndim != 2 or values.shape[1] % GROUP:
        return None
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-8) / 40
    stored = _int8(rotated(values), scale)
    settings = as_json(format="int8_tensorwise", convrot=True, convrot_groupsize=GROUP)
    return {"weight": stored, "weight_scale": scale, "comfy_quant": settings}, rotated(stored.float() * scale)


def rotated(values: torch.Tensor) -> torch.Tensor:
    """Return rows whose groups are multiplied by ConvRot's matrix of 16 × 16, 4 × 4 at a time."""
    grid = values.reshape(len(values), -1, 4, 4)
    for axis in (3, 2):
        one, two, three, four = grid.unbind(axis)
        sums = [(one + two) + (three - four), (one + two) - (three - four)]
        sums += [(one - two) + (three + four), (three + four) - (one - two)]
        grid = torch.stack(sums, axis)
    return (grid / 4).reshape(values.shape)


def bitsandbytes_int8(values: torch.Tensor) -> Packed:
    maxima = _rows(values).abs().amax(1).clamp(min=1e-6)
    shaped = maxima.view(-1, *[1] * (values.ndim - 1))
    stored = _int8(values, shaped / 127)
    beside = {"weight": stored, "SCB": maxima, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return beside, stored.float() * shaped * 7.874015718698502e-3


def fp8_rows(values: torch.Tensor) -> Packed:
    scale = (_rows(values).abs().amax(1).clamp(min=1e-8) / 448).bfloat16()
    shaped = scale.float().view(-1, *[1] * (values.ndim - 1))
    stored = (values / shaped).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * shaped


def fp8_tiles(values: torch.Tensor) -> Packed | None:
    if values.ndim != 2:
        return None
    rows, columns = values.shape
    scale = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    wide = torch.empty(rows, columns)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            tile = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            scale[row, column] = values[tile].abs().max() / 448
            wide[tile] = scale[row, column]
    stored = (values / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * wide


def _swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in cuBLAS's order, one by one."""
    rows, columns = scales.shape
    across = math.ceil(columns / 4)
    out = torch.zeros(math.ceil(rows / 128) * 128 * across * 4, dtype=torch.uint8)
    flat = scales.contiguous().view(torch.uint8)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = (row // 128) * across + column // 4
    out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = flat
    return out.view(math.ceil(rows / 128) * 128, across * 4)


def mxfp8(values: torch.Tensor) -> Packed | None:
    if values.ndim != 2 or values.shape[1] % 32:
        return None
    groups = values.reshape(len(values), -1, 32)
    exponent = (groups.abs().amax(2).clamp(min=1e-10) / 448).log2().ceil()
    scale = 2.0 ** exponent.unsqueeze(2)
    stored = (groups / scale).to(torch.float8_e4m3fn)
    beside = {"weight": stored.reshape(values.shape), "weight_scale": _swizzled((exponent + 127).to(torch.uint8))}
    return {**beside, "comfy_quant": as_json(format="mxfp8")}, (stored.float() * scale).reshape(values.shape)


def _codes(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest number of a table for each value."""
    return (values.unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    flat = codes.reshape(*codes.shape[:-1], -1, 2)
    return (flat[..., 0] << 4) | flat[..., 1]


def nvfp4(values: torch.Tensor) -> Packed | None:
    if values.ndim != 2 or values.shape[1] % 16:
        return None
    whole = values.abs().max() / (448 * 6)
    groups = values.reshape(len(values), -1, 16)
    scale = (groups.abs().amax(2) / 6 / whole).clamp(min=0.01).to(torch.float8_e4m3fn)
    wide = (scale.float() * whole).unsqueeze(2)
    table = torch.tensor([*E2M1, *(-one for one in E2M1)])
    codes = _codes(groups / wide, table)
    beside = {"weight": _in_pairs(codes.reshape(values.shape)), "weight_scale": _swizzled(scale).view(scale.dtype)}
    numbers = (table[codes.long()] * wide).reshape(values.shape)
    return {**beside, "weight_scale_2": whole, "comfy_quant": as_json(format="nvfp4")}, numbers


def _four_bits(values: torch.Tensor, kind: str, table: torch.Tensor, nested: bool) -> Packed | None:
    if values.numel() % BLOCK:
        return None
    blocks = values.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    settings: dict[str, object] = {"quant_type": kind, "blocksize": BLOCK, "dtype": "bfloat16"}
    settings["shape"] = list(values.shape)
    beside = {"weight.quant_map": table}
    if nested:
        offset = absmax.mean().item()
        groups = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        maxima = groups.abs().amax(1).clamp(min=1e-10)
        steps = torch.linspace(-1, 1, 256)
        stored = _codes(groups / maxima.unsqueeze(1), steps)
        absmax = (steps[stored.long()] * maxima.unsqueeze(1)).view(-1)[: len(absmax)] + offset
        beside |= {"weight.absmax": stored.view(-1)[: len(absmax)].clone(), "weight.nested_absmax": maxima}
        beside["weight.nested_quant_map"] = steps
        settings |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        beside["weight.absmax"] = absmax
    codes = _codes(blocks / absmax.unsqueeze(1).clamp(min=1e-10), table)
    beside["weight"] = _in_pairs(codes).reshape(-1, 1)
    beside[f"weight.quant_state.bitsandbytes__{kind}"] = as_json(**settings)
    return beside, (table[codes.long()] * absmax.unsqueeze(1)).reshape(values.shape)


def nf4(values: torch.Tensor) -> Packed | None:
    return _four_bits(values, "nf4", torch.tensor(NF4), nested=False)


def nf4_nested(values: torch.Tensor) -> Packed | None:
    return _four_bits(values, "nf4", torch.tensor(NF4), nested=True)


def fp4(values: torch.Tensor) -> Packed | None:
    return _four_bits(values, "fp4", torch.tensor([*FP4, *(-one for one in FP4)]), nested=False)


PACKERS: Mapping[str, Callable[[torch.Tensor], Packed | None]] = {
    "nf4, nested": nf4_nested,
    "int8, rotated": int8_rotated,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8, rows": int8_rows,
    "fp8, tiles": fp8_tiles,
    "fp8, rows": fp8_rows,
    "int8": int8,
    "int8 of bitsandbytes": bitsandbytes_int8,
    "nf4": nf4,
    "fp4": fp4,
}
"""What packs a weight in each form; None for a weight of a shape that the form cannot have."""

LISTED = {"nf4, nested": "nf4", "fp8, tiles": "fp8_e4m3", "fp8, rows": "fp8_e4m3"}
"""What `models list` calls a form, where it is not the first word of its name."""


def pack(name: str, values: torch.Tensor, form: str) -> Packed | None:
    """Return a weight's tensors by their names, and its numbers; None if it stays as it is."""
    if not name.endswith("weight") or values.ndim < 2:
        return None
    packed = PACKERS[form](values.float())
    if packed is None:
        return None
    stem = name.removesuffix("weight")
    return {stem + end: tensor for end, tensor in packed[0].items()}, packed[1]


def packed_in(path: Path) -> TensorInfo:
    """Return the only weight of a file."""
    [info] = find_packed(safetensors.read_header(path)).tensors.values()
    return info


def as_tensor(info: TensorInfo) -> ManifestTensor:
    """Return a tensor of a manifest, with the hashes of what is in the file."""
    place = TensorLocation("w", info.dtype, info.shape, info.path, info.offset, info.nbytes, packing=info.packing)
    with info.path.open("rb") as file:
        digester, opened = TensorDigester(), {info.path: file.fileno()}
        packing = manifest._hash_packing(place, opened, digester)
        xxh3 = digester.tensor(file.fileno(), place)
    return ManifestTensor("w", info.dtype, info.shape, info.path, info.offset, info.nbytes, False, xxh3, False, packing)


def stored_bytes(tensor: ManifestTensor) -> torch.Tensor:
    """Return what is in memory if the tensor stays quantised."""
    target = torch.empty(tensor.stored_nbytes, dtype=torch.uint8)
    read = Read("w", tensor.path, tensor.offset, tensor.nbytes, "U8", False, tensor.xxh3, target, beside=tensor.beside)
    [found] = read_all([read], 1)
    assert found == checksum_of(target)
    return target
