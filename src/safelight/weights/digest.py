"""Content hashes. BLAKE3 identifies a model; XXH3-128 (33 GB/s) verifies every load.

XXH3 detects accidental damage, not tampering; BLAKE3 over the same tensors is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import xxhash
from blake3 import blake3

from safelight.errors import CorruptFileError
from safelight.files.header import ITEM_BYTES
from safelight.weights.layout import TensorLocation

CHUNK_BYTES = 8 << 20
"""Bytes per read. It is large enough for BLAKE3 to use two cores."""

_WORDS = {
    "F16": ("u2", 0x7C00),
    "BF16": ("u2", 0x7F80),
    "F32": ("u4", 0x7F800000),
    "F64": ("u8", 0x7FF0000000000000),
}
"""For each float dtype, NumPy's unsigned integer of the same width and the mask of the exponent bits. If all exponent
bits are set, the value is infinity or NaN."""


class TensorDigester:
    """Digests tensors in one pass: an XXH3 for each, and one BLAKE3 for all. It also checks for NaN and infinity.

    ``progress``: called after each chunk with the number of its bytes.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.blake3 = blake3(max_threads=blake3.AUTO)
        self._progress = progress

    def tensor(self, descriptor: int, location: TensorLocation) -> str:
        """Return the XXH3-128 (hex) of the tensor's bytes in the file, and update the BLAKE3.

        BLAKE3 hashes the bytes in the module's layout, so a matrix that is stored transposed, or with its halves
        swapped, has the same hash.
        Raises CorruptFileError if the file is too short, or the tensor holds NaN or infinity.
        """
        # Not above: commands that only list models import this module.
        import numpy as np

        self.blake3.update(f"{location.name}\0{location.dtype}\0{','.join(map(str, location.shape))}\0".encode())
        fast = xxhash.xxh3_128()
        word, exponent = _WORDS.get(location.dtype, (f"V{ITEM_BYTES[location.dtype]}", None))
        # A chunk holds whole elements. A tensor in another layout is read as one chunk, because it moves as a whole.
        chunk = location.nbytes if location.transpose or location.swap_halves else CHUNK_BYTES
        for at in range(0, location.nbytes, max(chunk, 1)):
            data = read_exactly(
                descriptor, location.path, location.label, location.offset + at, min(chunk, location.nbytes - at)
            )
            fast.update(data)
            words = np.frombuffer(data, word)
            if exponent is not None and ((words & exponent) == exponent).any():
                raise CorruptFileError(location.path, f"tensor {location.label} holds NaN or infinity")
            self.blake3.update(
                in_module_order(data, location.dtype, location.shape, location.transpose, location.swap_halves)
            )
            if self._progress is not None:
                self._progress(len(data))
        return fast.hexdigest()


def in_module_order(data: bytes, dtype: str, shape: tuple[int, ...], transpose: bool, swap_halves: bool) -> bytes:
    """Return a tensor's bytes in the module's layout.

    ``data``: its bytes in the file; any part of them, if the file has the module's layout.
    ``dtype``: by safetensors' name.
    ``shape``: the module's.
    ``transpose``: the file stores the matrix transposed.
    ``swap_halves``: the file stores the second half of the rows before the first.
    """
    if swap_halves:
        half = len(data) // 2
        return data[half:] + data[:half]
    if not transpose:
        return data
    # Not above: commands that only list models import this module.
    import numpy as np

    words = np.frombuffer(data, f"V{ITEM_BYTES[dtype]}")
    return words.reshape(shape[::-1]).T.tobytes()


def read_exactly(descriptor: int, path: Path, name: str, offset: int, nbytes: int) -> bytes:
    """Read ``nbytes`` bytes at ``offset``. Raises CorruptFileError, naming the tensor, if the file is too short."""
    data = os.pread(descriptor, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(descriptor, nbytes - len(data), offset + len(data))
        if not more:
            raise CorruptFileError(path, f"ends within tensor {name}; it was cut off")
        data += more
    return data


def hash_texts(*parts: str) -> str:
    """Return the BLAKE3 (hex) of texts, each followed by a zero byte."""
    return blake3("".join(f"{part}\0" for part in parts).encode()).hexdigest()


def hash_bytes(data: bytes) -> str:
    """Return the BLAKE3 (hex) of bytes."""
    return blake3(data).hexdigest()
