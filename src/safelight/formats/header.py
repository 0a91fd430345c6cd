"""What every format's reader returns: the names, dtypes, shapes and places of tensors, and nothing of their bytes."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safelight.errors import CorruptFileError, UnreadableFileError

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
class TensorInfo:
    """One tensor of a file.

    ``offset`` and ``nbytes`` are bytes from the start of ``path``. ``strides`` counts elements and is None for a
    contiguous tensor; only pickles have others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

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
        return sum(info.nbytes for info in self.tensors.values())


def open_regular(path: Path) -> tuple[int, int]:
    """(file descriptor, size in bytes) of a regular file, opened for reading.

    Opened without blocking, so that a pipe put in a model's place cannot hang the caller.
    Raises UnreadableFileError with the reason for anything that is not a readable regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UnreadableFileError(path, _why_unreadable(path, error)) from error
    except ValueError as error:
        raise UnreadableFileError(path, "is not a path: it has a zero character") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnreadableFileError(path, f"is {_kind(status.st_mode)}, not a file")
    return descriptor, status.st_size


def _why_unreadable(path: Path, error: OSError) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "is a symbolic link that leads nowhere"
    reasons = {
        errno.ENOENT: "does not exist",
        errno.EACCES: "may not be read by this user",
        errno.EPERM: "may not be read by this user",
        errno.ELOOP: "is a symbolic link that leads back to itself",
        errno.ENXIO: "is a socket or device, not a file",
        errno.ENAMETOOLONG: "has a name that is too long",
    }
    return reasons.get(error.errno or 0, f"cannot be opened: {error.strerror}")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")


def refuse_known_strangers(path: Path, start: bytes, size: int) -> None:
    """Name the things that are often saved under a model's name: nothing, a web page, a Git LFS pointer.

    ``start`` holds the first bytes of the file. Raises CorruptFileError.
    """
    if size == 0:
        raise CorruptFileError(path, "is empty (0 bytes); download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CorruptFileError(path, "is a web page saved under this name (a login or error page?); download it again")
    if text.startswith(b"version https://git-lfs"):
        raise CorruptFileError(path, "is a Git LFS pointer, not the model; run `git lfs pull` where it came from")
