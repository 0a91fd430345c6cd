"""Content hashes. BLAKE3 names a model for good; XXH3-128 (33 GB/s) watches over every load.

XXH3 is not made to withstand an attacker; it is compared with a manifest that BLAKE3 named, and finds damage.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from blake3 import blake3

from safelight.errors import CorruptFileError

CHUNK_BYTES = 8 << 20
"""Large enough for BLAKE3 to use both cores."""

_EXPONENT = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}
"""All exponent bits set means infinity or NaN."""


class TensorDigester:
    """One pass over a file's tensors: their XXH3, one running BLAKE3, and whether every value is finite."""

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.blake3 = blake3(max_threads=blake3.AUTO)
        self._progress = progress

    def tensor(self, descriptor: int, path: Path, name: str, dtype: str, shape: tuple[int, ...], at: int, nbytes: int) -> str:
        """XXH3-128 (hex) of ``nbytes`` bytes at ``at``.

        Raises CorruptFileError when the file ends before, or when the tensor holds NaN or infinity.
        """
        self.blake3.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        fast = xxhash.xxh3_128()
        done = 0
        kind, mask = _EXPONENT[dtype]
        while done < nbytes:
            data = os.pread(descriptor, min(CHUNK_BYTES, nbytes - done), at + done)
            if not data:
                raise CorruptFileError(path, f"ends within tensor {name}; it was cut off")
            fast.update(data)
            self.blake3.update(data)
            whole = len(data) - len(data) % np.dtype(kind).itemsize
            words = np.frombuffer(data, kind, whole // np.dtype(kind).itemsize)
            if ((words & mask) == mask).any():
                raise CorruptFileError(path, f"tensor {name} holds NaN or infinity")
            done += len(data)
            if self._progress is not None:
                self._progress(len(data))
        return fast.hexdigest()


def named(*parts: str) -> str:
    """BLAKE3 (hex) of some texts, each closed by a zero byte."""
    return blake3("".join(f"{part}\0" for part in parts).encode()).hexdigest()
