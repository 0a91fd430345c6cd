"""Writes GGUF files. No torch here. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

from safelight.files.blocks import BLOCKS
from safelight.files.gguf import ALIGNMENT, MAGIC, TYPES
from safelight.files.header import ITEM_BYTES, TensorInfo

VERSION = 3

_NUMBER_OF = {form: number for number, form in TYPES.items()}
_UINT32, _STRING = 4, 8


def nbytes_of(form: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor. ``form``: a plain dtype or a block form that its rows fit."""
    if form in BLOCKS:
        return math.prod(shape) // BLOCKS[form].elements * BLOCKS[form].nbytes
    return math.prod(shape) * ITEM_BYTES[form]


def write(
    file: BinaryIO,
    metadata: Mapping[str, str | int],
    tensors: Iterable[TensorInfo],
    bytes_of: Callable[[TensorInfo], bytes],
) -> None:
    """Write a GGUF file. Names, forms and shapes come from ``tensors``, the bytes from ``bytes_of``.

    ``metadata``: texts, and whole numbers below 2**32.
    The tensors are stored in the given order, each at a multiple of 32 bytes.
    """
    listed = list(tensors)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(listed), len(metadata)))
    for key, value in metadata.items():
        header += _text(key)
        if isinstance(value, int):
            header += struct.pack("<II", _UINT32, value)
        else:
            header += struct.pack("<I", _STRING) + _text(value)
    at = 0
    for info in listed:
        # The file lists the axes from the innermost to the outermost.
        header += _text(info.name) + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        header += struct.pack("<IQ", _NUMBER_OF[info.dtype], at)
        at += _padded(nbytes_of(info.dtype, info.shape))
    file.write(header + bytes(_padded(len(header)) - len(header)))
    for info in listed:
        data = bytes_of(info)
        file.write(data)
        file.write(bytes(_padded(len(data)) - len(data)))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
