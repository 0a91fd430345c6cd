"""Reads and writes safetensors files, and rejects everything that the format forbids.

Specification: https://github.com/huggingface/safetensors#format. A file has a header length of 8 bytes (little-endian),
a JSON object, and then the tensors' bytes without gaps. The safetensors library makes most of these checks as well;
here each fault has its own message.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from safelight.errors import CorruptFileError
from safelight.files.disk import open_regular
from safelight.files.header import ITEM_BYTES, Header, TensorInfo, refuse_known_strangers

MOST_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

MOST_TENSORS = 100_000
"""The largest checkpoints have a few thousand tensors. A header with millions of names would only waste time."""

MOST_AXES = 64
"""Axes of a tensor: numpy's limit. No model has more than five."""

_LENGTH = struct.Struct("<Q")


class _Duplicate(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return result


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises UnreadableFileError when the file cannot be read.
    Raises CorruptFileError when lengths, JSON, dtypes or shapes violate the format, or when the tensors' bytes overlap,
    have gaps, or are followed by trailing bytes.
    """
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        start = file.read(64)
        refuse_known_strangers(path, start, size)
        if start.isascii() and all(byte >= 32 or byte in b"\r\n\t" for byte in start):
            raise CorruptFileError(path, "is not a safetensors file: it is text")
        if size < _LENGTH.size + 2:
            raise CorruptFileError(path, f"is too short for a safetensors file ({size} bytes); it was cut off")
        (length,) = _LENGTH.unpack(start[: _LENGTH.size])
        if length > size - _LENGTH.size:
            raise CorruptFileError(
                path, f"header claims {length} bytes, the file has {size}: it was cut off, or is not a safetensors file"
            )
        if length > MOST_HEADER_BYTES:
            raise CorruptFileError(path, f"header of {length} bytes is over the format's limit {MOST_HEADER_BYTES}")
        file.seek(_LENGTH.size)
        raw = file.read(length)
    return _parse(path, raw, size - _LENGTH.size - length, _LENGTH.size + length)


def _parse(path: Path, raw: bytes, data_bytes: int, data_start: int) -> Header:
    try:
        table: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except _Duplicate as error:
        raise CorruptFileError(path, f"header lists {error} twice") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CorruptFileError(path, f"header is not JSON ({error})") from error
    except RecursionError as error:
        raise CorruptFileError(path, "header is nested too deep") from error
    if not isinstance(table, dict):
        raise CorruptFileError(path, f"header is a JSON {type(table).__name__}, not an object")
    entries = cast("dict[str, Any]", table)
    metadata = _metadata(path, entries.pop("__metadata__", None))
    if len(entries) > MOST_TENSORS:
        raise CorruptFileError(path, f"header lists {len(entries)} tensors; the limit is {MOST_TENSORS}")
    tensors = {name: _tensor(path, name, entry, data_bytes, data_start) for name, entry in entries.items()}
    _check_cover(path, tensors, data_bytes, data_start)
    return Header(path, "safetensors", tensors, metadata)


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", value).values()):
        raise CorruptFileError(path, "__metadata__ is not an object whose values are strings")
    return cast("dict[str, str]", value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, data_bytes: int, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CorruptFileError(path, f"entry of tensor {name!r} is not an object")
    fields = cast("dict[str, Any]", entry)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptFileError(path, f"tensor {name!r} has unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in cast("list[Any]", shape)):
        raise CorruptFileError(path, f"tensor {name!r} has shape {shape!r}, not a list of sizes")
    if (
        not isinstance(offsets, list)
        or len(cast("list[Any]", offsets)) != 2
        or not all(_is_size(n) for n in cast("list[Any]", offsets))
    ):
        raise CorruptFileError(path, f"tensor {name!r} has data_offsets {offsets!r}, not a pair of offsets")
    begin, end = cast("list[int]", offsets)
    if not begin <= end <= data_bytes:
        raise CorruptFileError(
            path, f"tensor {name!r} ends at byte {end} of {data_bytes}: the file was cut off, or its header is wrong"
        )
    sizes = tuple(cast("list[int]", shape))
    if len(sizes) > MOST_AXES:
        raise CorruptFileError(path, f"tensor {name!r} has {len(sizes)} axes; the limit is {MOST_AXES}")
    needed = ITEM_BYTES[dtype]
    for n in sizes:
        needed *= n
    if needed != end - begin:
        raise CorruptFileError(
            path,
            f"tensor {name!r}: shape {list(sizes)} of {dtype} needs {needed} bytes, data_offsets give {end - begin}",
        )
    return TensorInfo(name, dtype, sizes, path, data_start + begin, end - begin)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data_bytes: int, data_start: int) -> None:
    """Check that the tensors fill the data without overlap or gap, as the format demands."""
    at, before = data_start, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < at:
            raise CorruptFileError(path, f"tensors {before!r} and {info.name!r} overlap")
        if info.offset > at:
            raise CorruptFileError(path, f"{info.offset - at} bytes before tensor {info.name!r} belong to no tensor")
        at, before = info.offset + info.nbytes, info.name
    trailing = data_start + data_bytes - at
    if trailing:
        raise CorruptFileError(path, f"{trailing} trailing bytes after the last tensor belong to no tensor")


def write(
    file: BinaryIO,
    tensors: Iterable[TensorInfo],
    bytes_of: Callable[[TensorInfo], bytes],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file. Names, dtypes and shapes come from ``tensors``, the bytes from ``bytes_of``.

    ``metadata``: besides the format that PyTorch's programs expect.
    The tensors are stored in the given order, without gaps. The header is padded to a multiple of 8 bytes.
    """
    listed = list(tensors)
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for info in listed:
        nbytes = info.elements * ITEM_BYTES[info.dtype]
        table[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(_LENGTH.pack(len(header)) + header)
    for info in listed:
        file.write(bytes_of(info))
