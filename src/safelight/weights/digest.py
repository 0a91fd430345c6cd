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
from safelight.formats.header import ITEM_BYTES
from safelight.formats.layout import TensorPlace

CHUNK_BYTES = 8 << 20
"""Large enough for BLAKE3 to use both cores."""

_WORDS = {
    "F16": (np.dtype(np.uint16), 0x7C00),
    "BF16": (np.dtype(np.uint16), 0x7F80),
    "F32": (np.dtype(np.uint32), 0x7F800000),
    "F64": (np.dtype(np.uint64), 0x7FF0000000000000),
}
"""All exponent bits set means infinity or NaN. Integers are never either."""


class TensorDigester:
    """One pass over a file's tensors: their XXH3, one running BLAKE3, and whether every value is finite."""

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.blake3 = blake3(max_threads=blake3.AUTO)
        self._progress = progress

    def tensor(self, descriptor: int, place: TensorPlace) -> str:
        """XXH3-128 (hex) of the tensor's bytes as the file has them.

        BLAKE3 takes them as the module has them, so that a matrix stored the other way round counts as the same.
        Raises CorruptFileError when the file ends before, or when the tensor holds NaN or infinity.
        """
        self.blake3.update(f"{place.name}\0{place.dtype}\0{','.join(map(str, place.shape))}\0".encode())
        fast = xxhash.xxh3_128()
        word, exponent = _WORDS.get(place.dtype, (np.dtype(f"V{ITEM_BYTES[place.dtype]}"), None))
        # A chunk holds whole elements; a transposed matrix is one chunk.
        chunk = place.nbytes if place.transpose else CHUNK_BYTES
        for at in range(0, place.nbytes, max(chunk, 1)):
            data = read_exactly(descriptor, place.path, place.label, place.offset + at, min(chunk, place.nbytes - at))
            fast.update(data)
            words = np.frombuffer(data, word)
            if exponent is not None and ((words & exponent) == exponent).any():
                raise CorruptFileError(place.path, f"tensor {place.label} holds NaN or infinity")
            self.blake3.update(words.reshape(place.shape[::-1]).T.tobytes() if place.transpose else data)
            if self._progress is not None:
                self._progress(len(data))
        return fast.hexdigest()


def read_exactly(descriptor: int, path: Path, name: str, offset: int, nbytes: int) -> bytes:
    """``nbytes`` bytes at ``offset``. Raises CorruptFileError, naming the tensor, when the file ends before."""
    data = os.pread(descriptor, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(descriptor, nbytes - len(data), offset + len(data))
        if not more:
            raise CorruptFileError(path, f"ends within tensor {name}; it was cut off")
        data += more
    return data


def named(*parts: str) -> str:
    """BLAKE3 (hex) of some texts, each closed by a zero byte."""
    return blake3("".join(f"{part}\0" for part in parts).encode()).hexdigest()
