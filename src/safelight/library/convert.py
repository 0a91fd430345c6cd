"""Formats other than safetensors are converted once into Safelight's own folder, then treated alike."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from safelight.errors import CorruptFileError
from safelight.formats import safetensors
from safelight.formats.header import ITEM_BYTES, Header, TensorInfo

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
    data = os.pread(descriptor, info.nbytes, info.offset)
    while len(data) < info.nbytes:
        more = os.pread(descriptor, info.nbytes - len(data), info.offset + len(data))
        if not more:
            raise CorruptFileError(info.path, f"ends within tensor {info.name}; it was cut off")
        data += more
    if info.strides is None:
        return data
    item = ITEM_BYTES[info.dtype]
    flat = np.frombuffer(data, np.dtype(f"V{item}"))
    strided = np.lib.stride_tricks.as_strided(flat, info.shape, tuple(step * item for step in info.strides))
    return np.ascontiguousarray(strided).tobytes()
