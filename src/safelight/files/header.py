"""The file header, which every format's reader returns: names, dtypes, shapes and offsets of tensors, but no bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safelight.errors import CorruptFileError

MADE_FROM = "safelight.made_from"
"""The key in a file's metadata that has the digest of the model from which Safelight made the file."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
"""Bytes of one element, by the dtype names of the safetensors format."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor that a packed one needs.

    ``kind``: what it has, one of the names in :mod:`safelight.weights.packed_decoding`.
    ``offset``, ``nbytes``: the range of bytes in ``path``.
    ``xxh3``: the XXH3-128 of those bytes, in hex; "" before they are read.
    """

    kind: str
    name: str
    dtype: str
    path: Path
    offset: int
    nbytes: int
    xxh3: str = ""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the numbers of a tensor follow from what the file stores.

    ``elements``: of a block, which is dequantised as a whole.
    ``scale``: all numbers are multiplied by it; None if there is no such scale.
    ``beside``: the tensors with other scales.
    ``group``: how many numbers share a scale, or are rotated together; 0 if none do.
    ``nested``: how many scales share a scale of their own; 0 if none do.
    ``offset``: is added to the scales that have scales of their own.
    ``first``: the first of the blocks that have scales, for a tensor that is a part of the one in the file.
    """

    elements: int = 1
    scale: float | None = None
    beside: tuple[Beside, ...] = ()
    group: int = 0
    nested: int = 0
    offset: float = 0.0
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors beside."""
        return sum(one.nbytes for one in self.beside)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    ``dtype``: by safetensors' or ggml's name, or one of :data:`safelight.files.packing.PACKED`.
    ``offset``: bytes from the start of ``path``.
    ``nbytes``: size in bytes, without the tensors beside.
    ``strides``: in elements; None for a contiguous tensor. Only pickles have tensors that are not contiguous.
    ``packing``: None if the dtype says all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    packing: Packing | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file (or of a folder's shards) by name, and the text metadata of the file."""

    path: Path
    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        beside = sum(info.packing.nbytes for info in self.tensors.values() if info.packing is not None)
        return beside + sum(info.nbytes for info in self.tensors.values())


_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How a zip file and the protocols of pickle begin. So may the length of a safetensors header."""


def is_pickle(start: bytes) -> bool:
    """Return whether a file is a pickle, in either of PyTorch's containers. ``start``: its first nine bytes or more."""
    return start.startswith(_PICKLES) and start[8:9] != b"{"


def refuse_known_strangers(path: Path, start: bytes, size: int) -> None:
    """Reject files that are often saved by mistake as a model: an empty file, a web page, a Git LFS pointer.

    ``start``: the first bytes of the file. ``size``: bytes of the file.
    Raises CorruptFileError, which names the mistake.
    """
    if size == 0:
        raise CorruptFileError(path, "is empty (0 bytes); download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CorruptFileError(path, "is a web page saved under this name (a login or error page?); download it again")
    if text.startswith(b"version https://git-lfs"):
        raise CorruptFileError(path, "is a Git LFS pointer, not the model; run `git lfs pull` where it came from")
