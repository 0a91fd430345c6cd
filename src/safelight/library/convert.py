"""Formats other than safetensors are converted once into Safelight's own folder, then treated alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from safelight.formats import safetensors
from safelight.formats.header import ITEM_BYTES, TensorInfo
from safelight.weights.digest import read_exactly


def to_safetensors(tensors: Iterable[TensorInfo], target: Path) -> None:
    """Write pickled tensors, of one file or several, dtypes as they are, as a safetensors file at ``target``.

    The file is written whole or not at all. Raises CorruptFileError when bytes are missing.
    """
    listed = list(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for path in {info.path for info in listed}:
            opened[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, opened[path])
        stack.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as file:
            safetensors.write(file, listed, lambda info: _bytes(opened[info.path], info))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)


def _bytes(descriptor: int, info: TensorInfo) -> bytes:
    data = read_exactly(descriptor, info.path, info.name, info.offset, info.nbytes)
    if info.strides is None:
        return data
    item = ITEM_BYTES[info.dtype]
    flat = np.frombuffer(data, np.dtype(f"V{item}"))
    strided = np.lib.stride_tricks.as_strided(flat, info.shape, tuple(step * item for step in info.strides))
    return np.ascontiguousarray(strided).tobytes()
