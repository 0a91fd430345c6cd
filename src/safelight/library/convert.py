"""Formats other than safetensors are converted once into Safelight's own folder, then treated alike."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from safelight.formats import safetensors
from safelight.formats.header import ITEM_BYTES, Header, TensorInfo
from safelight.weights.digest import read_exactly


def to_safetensors(header: Header, target: Path) -> None:
    """Write a pickle's tensors, dtypes as they are, as a safetensors file at ``target``, whole or not at all.

    Raises CorruptFileError when bytes are missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    descriptor = os.open(header.path, os.O_RDONLY)
    try:
        with temporary.open("wb") as file:
            safetensors.write(file, header.tensors.values(), lambda info: _bytes(descriptor, info))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _bytes(descriptor: int, info: TensorInfo) -> bytes:
    data = read_exactly(descriptor, info.path, info.name, info.offset, info.nbytes)
    if info.strides is None:
        return data
    item = ITEM_BYTES[info.dtype]
    flat = np.frombuffer(data, np.dtype(f"V{item}"))
    strided = np.lib.stride_tricks.as_strided(flat, info.shape, tuple(step * item for step in info.strides))
    return np.ascontiguousarray(strided).tobytes()
