"""Converts other formats to safetensors, once, into Safelight's own folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import BinaryIO

from safelight.errors import FileError, IncompleteModelError
from safelight.files import safetensors
from safelight.files.disk import open_regular, read_exactly
from safelight.files.header import ITEM_BYTES, TensorInfo


@contextlib.contextmanager
def reporting_errors_for(path: Path, temporary: Path) -> Generator[None]:
    """Raise errors about the conversion ``temporary`` as errors about the user's own file ``path``."""
    try:
        yield
    except IncompleteModelError as error:
        if error.path != temporary:
            raise
        parts = error.missing, error.mismatched, error.unexpected
        raise IncompleteModelError(path, error.what, *parts) from error
    except FileError as error:
        if error.path != temporary:
            raise
        raise type(error)(path, error.problem) from error


def to_safetensors(tensors: Iterable[TensorInfo], target: BinaryIO) -> None:
    """Write pickled tensors of one or several files into ``target`` as a safetensors file. Dtypes do not change.

    Raises CorruptFileError when bytes are missing, UnreadableFileError when a file cannot be read.
    """
    listed = list(tensors)
    assert all(info.packing is None for info in listed), "a conversion has the tensors as the file stores them"
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {info.path for info in listed}:
            opened[path], _ = open_regular(path)
            stack.callback(os.close, opened[path])
        safetensors.write(target, listed, lambda info: _bytes(opened[info.path], info))


def _bytes(descriptor: int, info: TensorInfo) -> bytes:
    data = read_exactly(descriptor, info.path, info.name, info.offset, info.nbytes)
    if info.strides is None:
        return data
    item = ITEM_BYTES[info.dtype]
    # Not above: commands that only list models import this module.
    import numpy as np

    flat = np.frombuffer(data, np.dtype(f"V{item}"))
    strided = np.lib.stride_tricks.as_strided(flat, info.shape, tuple(step * item for step in info.strides))
    return np.ascontiguousarray(strided).tobytes()
