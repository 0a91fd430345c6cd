"""Stores numbers to memory past the processor's cache. Importing this module imports numba.

A store through the cache first reads the memory that it overwrites. Most weights are larger than a cache, so that
reading only costs time (docs/speed.md).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as untyped

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
def _fence(_context: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True, cache=True)
def finish() -> None:
    """Wait until other threads see what was stored. Stores past the cache are not ordered otherwise."""
    _fence()
