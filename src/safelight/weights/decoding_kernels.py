"""The functions of :mod:`safelight.weights.compiled_decoding`. Importing this module imports numba.

``raw``: uint8, (blocks, bytes). ``out``: (blocks, numbers), uint32 for fp32, uint16 for bf16; it is written.
``halves``: the fp32 number of each fp16 number's bits. ``scale``: of fp8.
``aligned``: each row of ``out`` begins at a multiple of :data:`ALIGNMENT` bytes and is as long as one.

bf16 is stored past the processor's cache: a store through the cache first reads the memory that it overwrites. Most
weights are larger than a cache, so that reading only costs time (docs/speed.md). All of it is in this module, because
numba compiles a function again only when its own module changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as untyped

from safelight.files.blocks import SUPERBLOCK

_JIT: Any = numba.njit(nogil=True, cache=True, fastmath=False)
"""Without ``fastmath``, each operation is rounded as torch rounds it."""

intrinsic: Any = untyped
"""Its functions are called without their first argument, the context."""

LANES = 16
"""Numbers that are stored at a time."""

ALIGNMENT = 2 * LANES
"""Bytes. Stores past the cache must begin at a multiple of it."""

_WORD, _LEAST = ir.IntType(32), ir.IntType(16)


@intrinsic
def store_rounded(_context: Any, bits: Any, row: Any) -> Any:
    """Write fp32 numbers as bf16, rounded to the nearest, ties to even.

    ``bits``: the bits of the numbers, uint32, (numbers).
    ``row``: uint16, (numbers); it begins at a multiple of :data:`ALIGNMENT` bytes, and its length is one of ``LANES``.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, target = (
            context.make_array(kind)(context, builder, one) for kind, one in zip(signature.args, arguments, strict=True)
        )
        words, least = ir.VectorType(_WORD, LANES), ir.VectorType(_LEAST, LANES)

        def each(number: int) -> ir.Constant:
            return ir.Constant(words, [number] * LANES)

        [count] = cgutils.unpack_tuple(builder, target.shape)
        with cgutils.for_range(builder, builder.sdiv(count, count.type(LANES))) as loop:
            at = builder.mul(loop.index, count.type(LANES))
            wide = builder.load(builder.bitcast(builder.gep(source.data, [at]), words.as_pointer()), align=4)
            odd = builder.icmp_unsigned("!=", builder.and_(wide, each(1 << 16)), each(0))
            rounded = builder.lshr(builder.add(wide, builder.select(odd, each(0x8000), each(0x7FFF))), each(16))
            place = builder.bitcast(builder.gep(target.data, [at]), least.as_pointer())
            stored = builder.store(builder.trunc(rounded, least), place, align=ALIGNMENT)
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))
        return context.get_dummy_value()

    return types.void(bits, row), generate


@intrinsic
def as_float(_context: Any, _bits: Any) -> Any:
    """Return the fp32 number with these bits."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _fence(_context: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_JIT
def finish() -> None:
    """Wait until other threads see what was stored. Stores past the cache are not ordered otherwise."""
    _fence()


@_JIT
def store(wide: np.ndarray, out: np.ndarray, block: int, aligned: bool) -> None:
    """Write the fp32 numbers of a block as they are, or rounded to the nearest bf16, ties to even."""
    bits = wide.view(np.uint32)
    if out.itemsize == 4:
        for n in range(out.shape[1]):
            out[block, n] = bits[n]
    elif aligned:
        store_rounded(bits, out[block])
    else:
        for n in range(out.shape[1]):
            word = bits[n]
            out[block, n] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@_JIT
def half(raw: np.ndarray, block: int, at: int, halves: np.ndarray) -> np.float32:
    """Return the fp16 number at an offset of a block."""
    return halves[np.uint32(raw[block, at]) | (np.uint32(raw[block, at + 1]) << np.uint32(8))]


@_JIT
def q4_0(raw: np.ndarray, out: np.ndarray, halves: np.ndarray, _scale: np.float32, aligned: bool) -> None:
    """Dequantise rows of one or several blocks of 32 numbers."""
    wide = np.empty(out.shape[1], np.float32)
    # Loops of a length that the compiler does not know become loops over vectors; it unrolls short ones otherwise.
    blocks = out.shape[1] // 32
    count = out.shape[1] // blocks // 2
    for row in range(len(raw)):
        for block in range(blocks):
            factor, at = half(raw, row, 18 * block, halves), 32 * block
            for n in range(count):
                word = raw[row, 18 * block + 2 + n]
                wide[at + n] = (np.float32(word & np.uint8(0xF)) - np.float32(8)) * factor
                wide[at + 16 + n] = (np.float32(word >> np.uint8(4)) - np.float32(8)) * factor
        store(wide, out, row, aligned)


@_JIT
def q8_0(raw: np.ndarray, out: np.ndarray, halves: np.ndarray, _scale: np.float32, aligned: bool) -> None:
    """Dequantise rows of one or several blocks of 32 numbers."""
    wide = np.empty(out.shape[1], np.float32)
    blocks = out.shape[1] // 32
    count = out.shape[1] // blocks
    for row in range(len(raw)):
        for block in range(blocks):
            factor, at = half(raw, row, 34 * block, halves), 32 * block
            for n in range(count):
                wide[at + n] = np.float32(np.int8(raw[row, 34 * block + 2 + n])) * factor
        store(wide, out, row, aligned)


@_JIT
def scales_and_minima(raw: np.ndarray, block: int, halves: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> None:
    """Read the eight scales and minima of Q4_K and Q5_K."""
    factor, least = half(raw, block, 0, halves), half(raw, block, 2, halves)
    for n in range(4):
        one, other, both = raw[block, 4 + n], raw[block, 8 + n], raw[block, 12 + n]
        scales[n] = factor * np.float32(one & 0x3F)
        minima[n] = least * np.float32(other & 0x3F)
        scales[n + 4] = factor * np.float32((both & 0xF) | ((one >> 2) & 0x30))
        minima[n + 4] = least * np.float32((both >> 4) | ((other >> 2) & 0x30))


@_JIT
def q4_k(raw: np.ndarray, out: np.ndarray, halves: np.ndarray, _scale: np.float32, aligned: bool) -> None:
    wide = np.empty(SUPERBLOCK, np.float32)
    scales, minima = np.empty(8, np.float32), np.empty(8, np.float32)
    count = out.shape[1] // 8
    for block in range(len(raw)):
        scales_and_minima(raw, block, halves, scales, minima)
        for pair in range(4):
            at = 64 * pair
            lower, upper = scales[2 * pair], scales[2 * pair + 1]
            least, other = minima[2 * pair], minima[2 * pair + 1]
            for n in range(count):
                word = raw[block, 16 + 32 * pair + n]
                wide[at + n] = np.float32(word & np.uint8(0xF)) * lower - least
                wide[at + 32 + n] = np.float32(word >> np.uint8(4)) * upper - other
        store(wide, out, block, aligned)


@_JIT
def q5_k(raw: np.ndarray, out: np.ndarray, halves: np.ndarray, _scale: np.float32, aligned: bool) -> None:
    wide = np.empty(SUPERBLOCK, np.float32)
    scales, minima = np.empty(8, np.float32), np.empty(8, np.float32)
    count = out.shape[1] // 8
    for block in range(len(raw)):
        scales_and_minima(raw, block, halves, scales, minima)
        for part in range(8):
            scale, least, at, shift = scales[part], minima[part], np.uint8(part), np.uint8(4 * (part % 2))
            for n in range(count):
                lower = (raw[block, 48 + 32 * (part // 2) + n] >> shift) & np.uint8(0xF)
                upper = ((raw[block, 16 + n] >> at) & np.uint8(1)) << np.uint8(4)
                wide[32 * part + n] = np.float32(lower | upper) * scale - least
        store(wide, out, block, aligned)


@_JIT
def q6_k(raw: np.ndarray, out: np.ndarray, halves: np.ndarray, _scale: np.float32, aligned: bool) -> None:
    wide = np.empty(SUPERBLOCK, np.float32)
    count = out.shape[1] // 16
    for block in range(len(raw)):
        whole = half(raw, block, 208, halves)
        # Each 128 numbers have the lower bits of 64 bytes: first the lower halves of all, then the upper ones.
        for part in range(8):
            side, place = part // 4, part % 4
            lower_at, shift = 64 * side + 32 * (place % 2), np.uint8(4 * (place // 2))
            upper_at, higher = 128 + 32 * side, np.uint8(2 * place)
            for n in range(2 * count):
                lower = (raw[block, lower_at + n] >> shift) & np.uint8(0xF)
                upper = ((raw[block, upper_at + n] >> higher) & np.uint8(3)) << np.uint8(4)
                wide[32 * part + n] = np.float32(lower | upper) - np.float32(32)
        for part in range(16):
            scale = whole * np.float32(np.int8(raw[block, 192 + part]))
            for n in range(count):
                wide[16 * part + n] *= scale
        store(wide, out, block, aligned)


@_JIT
def f8_e4m3(raw: np.ndarray, out: np.ndarray, _halves: np.ndarray, scale: np.float32, aligned: bool) -> None:
    wide = np.empty(raw.shape[1], np.float32)
    for block in range(len(raw)):
        for n in range(len(wide)):
            word = np.uint32(raw[block, n])
            # The exponent's bias is 7, and 127 in fp32. Without an exponent, a number is m · 2⁻⁹: 2⁻⁶ + m · 2⁻⁹ here.
            normal = (word & np.uint32(0x78)) != np.uint32(0)
            bias = np.uint32(120 << 23) if normal else np.uint32(121 << 23)
            value = as_float(((word & np.uint32(0x7F)) << np.uint32(20)) + bias)
            value = (value - (np.float32(0) if normal else np.float32(2**-6))) * scale
            wide[n] = -value if word & np.uint32(0x80) else value
        store(wide, out, block, aligned)


KERNELS: Mapping[str, Any] = {
    "Q4_0": q4_0,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "F8_E4M3": f8_e4m3,
}
"""By form."""
