"""Reads the header of a GGUF file, and rejects everything that the format forbids. No torch here.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file has a magic number, a version, counts,
metadata, the descriptions of the tensors, and then the tensors' bytes, each at a multiple of the alignment.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import CorruptFileError, UnsupportedModelError
from safelight.files.blocks import BLOCKS
from safelight.files.disk import open_regular
from safelight.files.header import ITEM_BYTES, Header, TensorInfo, refuse_known_strangers

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MOST_TENSORS = 100_000
MOST_VALUES = 100_000
MOST_HEADER_BYTES = 200_000_000
"""Text encoders' files contain their tokenizer: some ten megabytes."""

MOST_AXES = 4
"""ggml's limit."""

MOST_NUMBERS = 1024
"""An array of more numbers is not kept. Safelight reads none."""

MOST_DIGITS = 20
MOST_ORIGINAL_AXES = 16

MOST_NESTING = 4
"""Arrays within arrays. Files have none."""

ALIGNMENT = 32
"""Bytes, if the metadata names no other."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Begins the name of the metadata value with the real shape of a tensor that was reshaped, so that it has blocks."""

TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""ggml's types by number (``ggml_type``). The names of plain types are those of safetensors."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    The metadata are texts: numbers as Python writes them, arrays with commas. Arrays of texts (a tokenizer's
    vocabulary) are left out.

    Raises UnreadableFileError when the file cannot be read.
    Raises UnsupportedModelError for a version or a tensor's type that Safelight does not read.
    Raises CorruptFileError when counts, lengths, names, types, shapes or offsets violate the format.
    """
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        return _Reader(path, file, size).header()


@dataclass(slots=True)
class _Reader:
    path: Path
    file: BinaryIO
    size: int
    at: int = 0

    def header(self) -> Header:
        start = self.file.read(64)
        refuse_known_strangers(self.path, start, self.size)
        self.file.seek(0)
        if self._bytes(4, "the magic number") != MAGIC:
            raise CorruptFileError(self.path, "is not a GGUF file")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            # A file of a machine with the other byte order has its version in the upper bytes.
            order = "; it is stored in big-endian byte order" if version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(self.path, f"is GGUF of version {version}{order}; versions 2 and 3 are read")
        tensors, values = self._number("Q", "the number of tensors"), self._number("Q", "the number of metadata values")
        if tensors > MOST_TENSORS or values > MOST_VALUES:
            what = f"{tensors} tensors and {values} metadata values; the limit is {MOST_TENSORS}"
            raise CorruptFileError(self.path, f"header lists {what}")
        metadata = self._metadata(values)
        entries = self._entries(tensors)
        alignment = self._alignment(metadata)
        start_of_data = -(-self.at // alignment) * alignment
        infos = {
            name: self._tensor(name, dims, kind, offset, alignment, start_of_data, metadata)
            for name, (dims, kind, offset) in entries.items()
        }
        self._check_overlap(infos)
        unknown = [
            key for key in metadata if key.startswith(ORIGINAL_SHAPE) and key[len(ORIGINAL_SHAPE) :] not in infos
        ]
        if unknown:
            raise CorruptFileError(self.path, f"has metadata {unknown[0]!r}, and no such tensor")
        return Header(self.path, "gguf", infos, metadata)

    def _bytes(self, count: int, what: str) -> bytes:
        if self.at + count > min(self.size, MOST_HEADER_BYTES):
            limit = f"the limit is {MOST_HEADER_BYTES}" if self.size > MOST_HEADER_BYTES else "it was cut off"
            problem = (
                f"header ends at byte {self.at}, within {what} of {count} bytes ({self.size} in the file): {limit}"
            )
            raise CorruptFileError(self.path, problem)
        self.at += count
        data = self.file.read(count)
        if len(data) < count:
            raise CorruptFileError(self.path, f"ends within {what}; it was cut off")
        return data

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self._bytes(struct.calcsize("<" + form), what))[0]

    def _text(self, what: str) -> str:
        data = self._bytes(self._number("Q", f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(self.path, f"{what} is not UTF-8 ({error})") from error

    def _metadata(self, count: int) -> dict[str, str]:
        found: dict[str, str] = {}
        for _ in range(count):
            key = self._text("a metadata name")
            if key in found:
                raise CorruptFileError(self.path, f"header lists metadata {key!r} twice")
            value = self._value(self._number("I", f"the type of {key!r}"), f"the value of {key!r}", 0)
            found[key] = "" if value is None else value
        return found

    def _value(self, kind: int, what: str, depth: int) -> str | None:
        """Return a metadata value as text; None for an array that is not kept."""
        if kind in _SCALARS:
            return str(self._number(_SCALARS[kind], what))
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY or depth == MOST_NESTING:
            raise CorruptFileError(self.path, f"{what} has the unknown type {kind}")
        kind, count = self._number("I", what), self._number("Q", what)
        if kind in _SCALARS:
            form = f"{count}{_SCALARS[kind]}"
            if count * struct.calcsize("<" + _SCALARS[kind]) > self.size:
                raise CorruptFileError(self.path, f"{what} claims {count} elements, and the file has {self.size} bytes")
            numbers = self._bytes(struct.calcsize("<" + form), what)
            return None if count > MOST_NUMBERS else ",".join(map(str, struct.unpack("<" + form, numbers)))
        if count > self.size:
            raise CorruptFileError(self.path, f"{what} claims {count} elements, and the file has {self.size} bytes")
        for _ in range(count):
            self._value(kind, what, depth + 1)
        return None

    def _entries(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Return the axes, in the file's order, the number of the type, and the offset of each tensor."""
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("a tensor's name")
            if name in found:
                raise CorruptFileError(self.path, f"header lists tensor {name!r} twice")
            axes = self._number("I", f"the axes of {name!r}")
            if axes > MOST_AXES:
                raise CorruptFileError(self.path, f"tensor {name!r} has {axes} axes; the limit is {MOST_AXES}")
            dims = tuple(self._number("q", f"the shape of {name!r}") for _ in range(axes))
            negative = next((one for one in dims if one < 0), None)
            if negative is not None:
                raise CorruptFileError(self.path, f"tensor {name!r} has the size {negative} in its shape {list(dims)}")
            found[name] = dims, self._number("I", f"the type of {name!r}"), self._number("Q", f"the offset of {name!r}")
        return found

    def _alignment(self, metadata: Mapping[str, str]) -> int:
        text = metadata.get("general.alignment", str(ALIGNMENT))
        value = _natural(text)
        if value <= 0 or value % 8:
            raise CorruptFileError(self.path, f"general.alignment is {text!r}; it must be a multiple of 8")
        return value

    def _tensor(
        self,
        name: str,
        dims: tuple[int, ...],
        kind: int,
        offset: int,
        alignment: int,
        start: int,
        metadata: Mapping[str, str],
    ) -> TensorInfo:
        form = TYPES.get(kind)
        if form is None:
            raise CorruptFileError(self.path, f"tensor {name!r} has the unknown type {kind}")
        # The file lists the axes from the innermost to the outermost.
        shape = dims[::-1]
        if form in BLOCKS:
            block = BLOCKS[form]
            row = shape[-1] if shape else 1
            if row % block.elements:
                problem = f"tensor {name!r} has rows of {row} numbers, no multiple of the {block.elements} in a block"
                raise CorruptFileError(self.path, f"{problem} of {form}")
            nbytes = math.prod(shape) // block.elements * block.nbytes
        elif form in ITEM_BYTES:
            nbytes = math.prod(shape) * ITEM_BYTES[form]
        else:
            raise UnsupportedModelError(self.path, f"tensor {name!r} is {form}; {', '.join(BLOCKS)} are read")
        if offset % alignment:
            raise CorruptFileError(self.path, f"tensor {name!r} begins at {offset}, no multiple of {alignment}")
        if start + offset + nbytes > self.size:
            end = start + offset + nbytes
            raise CorruptFileError(
                self.path,
                f"tensor {name!r} ends at byte {end} of {self.size}: the file was cut off, or its header is wrong",
            )
        shape = self._original_shape(name, shape, metadata)
        return TensorInfo(name, form, shape, self.path, start + offset, nbytes)

    def _original_shape(self, name: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> tuple[int, ...]:
        text = metadata.get(ORIGINAL_SHAPE + name)
        if text is None:
            return shape
        parts = text.split(",")
        original = tuple(_natural(one) for one in parts) if len(parts) <= MOST_ORIGINAL_AXES else ()
        if math.prod(original) != math.prod(shape) or not original:
            problem = f"{ORIGINAL_SHAPE}{name} is {text!r}, which does not fit the tensor's shape {list(shape)}"
            raise CorruptFileError(self.path, problem)
        return original

    def _check_overlap(self, tensors: Mapping[str, TensorInfo]) -> None:
        at, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset < at:
                raise CorruptFileError(self.path, f"tensors {before!r} and {info.name!r} overlap")
            at, before = info.offset + info.nbytes, info.name


def _natural(text: str) -> int:
    """Return the number that a text says; 0 if it says none, or one that no size has."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else 0
