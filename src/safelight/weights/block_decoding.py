"""Dequantises the block forms of GGUF to fp32, on any device.

Each function computes what ``gguf.quants`` computes, in the same order, so the results are equal bit for bit.
``blocks``: uint8, (blocks, bytes). ``out``: fp32, (blocks, elements); it is written.
Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import torch

from safelight.devices.transfer import CHUNK_ELEMENTS, DTYPES, Blocks, Compiled, Decode, FindCompiled
from safelight.files.blocks import BLOCKS, SUPERBLOCK
from safelight.files.header import Packing
from safelight.files.packing import PACKED
from safelight.weights.compiled_decoding import FORMS, compiled_for
from safelight.weights.manifest import ManifestTensor
from safelight.weights.packed_decoding import LARGE_SCALE, PackedDecoder, fp8_e4m3, fp8_e5m2

Decoder = Callable[[torch.Tensor, torch.Tensor], None]

DEVICE_CHUNK_ELEMENTS = 1 << 23
"""Numbers that a GPU dequantises at a time by separate operations. To start an operation takes about 10 µs, so a chunk
of a processor's size takes 20 times as long as its bytes (docs/speed.md). This one needs at most 100 MB meanwhile."""

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the four-bit numbers of the IQ4 forms."""


def decode(form: str, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantise whole blocks.

    ``form``: one of :data:`BLOCKS`.
    ``raw``: uint8, one axis: the bytes of the blocks.
    ``out``: fp32, one axis, contiguous: the numbers.
    """
    block = BLOCKS[form]
    _DECODERS[form](raw.view(-1, block.nbytes), out.view(-1, block.elements))


@lru_cache(maxsize=4096)
def decoding_of(form: str, packing: Packing | None, nbytes: int = 0, elements: int = 0) -> Blocks | None:
    """Return how to dequantise a tensor; None for a dtype of 16 bits or more without a scale.

    ``form``, ``packing``, ``nbytes``, ``elements``: of the tensor. The last two only count if it has tensors beside it.
    """
    scale = None if packing is None else packing.scale
    compiled = _compiled(form, 1.0 if scale is None else scale)
    if form in BLOCKS:
        return Blocks(BLOCKS[form].elements, BLOCKS[form].nbytes, _alone(partial(decode, form)), compiled)
    if packing is not None and (packing.beside or packing.group or form in PACKED):
        return Blocks(packing.elements, nbytes * packing.elements // elements, PackedDecoder(form, packing))
    if form in _FP8:
        return Blocks(1, 1, _alone(partial(_FP8[form], scale=1.0 if scale is None else scale)), compiled)
    return None if scale is None else Blocks(1, DTYPES[form].itemsize, _alone(partial(_multiply, DTYPES[form], scale)))


def _compiled(form: str, scale: float) -> Mapping[str, FindCompiled]:
    """Return what finds the compiled functions, by the type of a device."""
    if scale >= LARGE_SCALE:
        return {}

    def find(device: str) -> Compiled | None:
        found = compiled_for(form, device)
        return None if found is None else partial(found, scale=scale)

    return {device: partial(find, device) for device in FORMS}


def _alone(decoder: Decoder) -> Decode:
    """Return the function for blocks that need no tensors beside them, wherever they are."""

    def decode(raw: torch.Tensor, out: torch.Tensor, first: int, beside: torch.Tensor) -> None:
        del first, beside
        decoder(raw, out)

    return decode


_FP8 = {"F8_E4M3": fp8_e4m3, "F8_E5M2": fp8_e5m2}


def dequantise(tensor: ManifestTensor, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantise a tensor. The numbers are computed in fp32 and rounded once to the dtype of ``out``.

    ``raw``: its bytes as the file stores them, followed by those of the tensors beside it; uint8, one axis.
    ``out``: contiguous, on the same device; it is written.
    """
    decoding = decoding_of(tensor.dtype, tensor.packing, tensor.nbytes, out.numel())
    if decoding is None:
        out.copy_(raw.view(DTYPES[tensor.dtype]).view(tensor.shape))
        return
    flat, total, beside = out.view(-1), tensor.nbytes // decoding.nbytes, raw[tensor.nbytes :]
    compiled = decoding.compiled_for(flat)

    def decode_range(first: int, end: int) -> None:
        if compiled is None:
            _decode_in_chunks(decoding, raw, beside, flat, first, end, _chunk(decoding, raw.device))
        else:
            nbytes, elements = decoding.nbytes, decoding.elements
            compiled(raw[first * nbytes : end * nbytes], flat[first * elements : end * elements])

    threads = torch.get_num_threads() if raw.device.type == "cpu" else 1
    if threads == 1 or not total:
        decode_range(0, total)
        return
    # Each thread computes alone. torch's own threads would share each of many small operations, which is slower
    # (docs/speed.md). Compiled functions are fastest if each part begins at a row of 256 numbers.
    row = max(1, SUPERBLOCK // decoding.elements)
    share = -(-total // (threads * row)) * row
    parts = [(first, min(first + share, total)) for first in range(0, total, share)]
    pool = _pool(os.getpid(), threads)
    try:
        for done in [pool.submit(decode_range, *part) for part in parts]:
            done.result()
    finally:
        # A thread of the pool sets the number of threads also for all threads that begin later. Set it back.
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads that dequantise. ``process``: its id, because a forked process has none of the threads."""
    del process
    return ThreadPoolExecutor(threads, "safelight-dequantise", lambda: torch.set_num_threads(1))


def _chunk(decoding: Blocks, device: torch.device) -> int:
    """Return how many numbers to dequantise at a time: on a CPU, as many as a core's cache holds."""
    if device.type != "cpu":
        return DEVICE_CHUNK_ELEMENTS
    # fp8 needs temporary memory as large as the chunk. The system takes large temporary memory back after each use, and
    # providing it again is slow. So its chunks are smaller.
    return CHUNK_ELEMENTS if decoding.elements > 1 else CHUNK_ELEMENTS // 2


@torch.inference_mode()
def _decode_in_chunks(
    decoding: Blocks, raw: torch.Tensor, beside: torch.Tensor, flat: torch.Tensor, first: int, end: int, chunk: int
) -> None:
    """Dequantise the blocks from ``first`` to before ``end``, about ``chunk`` numbers at a time."""
    elements, nbytes = decoding.elements, decoding.nbytes
    blocks = max(1, chunk // elements)
    wide = torch.empty(min(blocks, end - first) * elements, dtype=torch.float32, device=raw.device)
    for at in range(first, end, blocks):
        to = min(at + blocks, end)
        target = flat[at * elements : to * elements]
        decoding.decode_to(raw[at * nbytes : to * nbytes], target, at, beside, wide[: target.numel()])


def _multiply(dtype: torch.dtype, scale: float, raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(raw.view(dtype))
    out.mul_(scale)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the fp16 number at an offset of each block as fp32, (blocks, 1)."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _halves(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Write the lower four bits of bytes, then the upper four. ``out``: (…, 2, bytes)."""
    out[..., 0, :] = packed & 0xF
    out[..., 1, :] = packed >> 4


def _q4(blocks: torch.Tensor, out: torch.Tensor, at: int) -> None:
    _halves(blocks[:, at : at + 16], out.view(-1, 2, 16))


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks, out, 2)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks, out, 4)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return 16 for each bit that is set. ``packed``: (blocks, 4), the least bit first. Returns (blocks, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 1) << 4).view(-1, 32)


def _q5(blocks: torch.Tensor, out: torch.Tensor, at: int) -> None:
    _q4(blocks, out, at + 4)
    out.add_(_fifth_bits(blocks[:, at : at + 4]))


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q5(blocks, out, 2)
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q5(blocks, out, 4)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scales, packed = blocks[:, :16], blocks[:, 16:80].view(-1, 2, 32)
    view = out.view(-1, 2, 4, 32)
    for place in range(4):
        view[:, :, place] = (packed >> (2 * place)) & 3
    scale = (_half(blocks, 80) * (scales & 0xF).float()).unsqueeze(-1)
    least = (_half(blocks, 82) * (scales >> 4).float()).unsqueeze(-1)
    out.view(-1, 16, 16).mul_(scale).sub_(least)


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    mask, packed, scales = blocks[:, :32], blocks[:, 32:96].view(-1, 2, 32), blocks[:, 96:108]
    view = out.view(-1, 2, 4, 32)
    for part in range(2):
        for place in range(4):
            lower = ((packed[:, part] >> (2 * place)) & 3).to(torch.int8)
            # The offset is zero where the bit is set.
            missing = ((mask >> (4 * part + place)) & 1 ^ 1).to(torch.int8)
            view[:, part, place] = lower - (missing << 2)
    lower = torch.cat([scales[:, :8] & 0xF, scales[:, :8] >> 4], dim=1)
    upper = torch.cat([(scales[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = ((lower | (upper << 4)).to(torch.int8) - 32).float()
    out.view(-1, 16, 16).mul_((_half(blocks, 108) * scale).unsqueeze(-1))


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eight scales and minima of Q4_K and Q5_K, fp32, (blocks, 8, 1).

    They have six bits each: the first four of both have their own bytes, whose upper two bits belong to the last four.
    """
    scale, least, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scale & 0x3F, (both & 0xF) | ((scale >> 2) & 0x30)], dim=1)
    minima = torch.cat([least & 0x3F, (both >> 4) | ((least >> 2) & 0x30)], dim=1)
    return (_half(blocks, 0) * scales.float()).unsqueeze(-1), (_half(blocks, 2) * minima.float()).unsqueeze(-1)


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _halves(blocks[:, 16:144].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    scale, least = _scales_and_minima(blocks)
    out.view(-1, 8, 32).mul_(scale).sub_(least)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    upper, view = blocks[:, 16:48], out.view(-1, 8, 32)
    _halves(blocks[:, 48:176].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    for place in range(8):
        view[:, place] += ((upper >> place) & 1) << 4
    scale, least = _scales_and_minima(blocks)
    view.mul_(scale).sub_(least)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    lower, upper = blocks[:, :128].view(-1, 2, 64), blocks[:, 128:192].view(-1, 2, 32)
    view = out.view(-1, 2, 2, 64)
    _halves(lower, view)
    quarters = out.view(-1, 2, 4, 32)
    for place in range(4):
        quarters[:, :, place] += ((upper >> (2 * place)) & 3) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    out.view(-1, 16, 16).sub_(32).mul_(scale.unsqueeze(-1))


def _four_bits(packed: torch.Tensor) -> torch.Tensor:
    """Look up four-bit numbers. ``packed``: (…, 16). Returns fp32, (…, 32): the lower halves first."""
    values = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=packed.device)
    return values[torch.cat([packed & 0xF, packed >> 4], dim=-1).long()]


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(_four_bits(blocks[:, 2:18]))
    out.mul_(_half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    upper, lower = blocks[:, 2:4], blocks[:, 4:8]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    high = ((upper.unsqueeze(-1) >> shifts) & 3).view(-1, 8)
    low = torch.stack([lower & 0xF, lower >> 4], dim=-1).view(-1, 8)
    scale = ((low | (high << 4)).to(torch.int8) - 32).float()
    view = out.view(-1, 8, 32)
    view.copy_(_four_bits(blocks[:, 8:].view(-1, 8, 16)))
    view.mul_((_half(blocks, 0) * scale).unsqueeze(-1))


_DECODERS: Mapping[str, Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
