"""Content hashes. BLAKE3 identifies a model; XXH3-128 (33 GB/s) verifies every load.

XXH3 detects accidental damage, not tampering; BLAKE3 over the same tensors is the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import xxhash
from blake3 import blake3

from safelight.errors import CorruptFileError
from safelight.files.blocks import BLOCKS
from safelight.files.disk import read_exactly
from safelight.files.header import ITEM_BYTES, Beside
from safelight.weights.layout import TensorLocation

CHUNK_BYTES = 8 << 20
"""Bytes per read. It is large enough for BLAKE3 to use two cores."""

_HALF_EXPONENT = 0x7C00
_WORDS = {
    "F16": ("u2", _HALF_EXPONENT, _HALF_EXPONENT),
    "BF16": ("u2", 0x7F80, 0x7F80),
    "F32": ("u4", 0x7F800000, 0x7F800000),
    "F64": ("u8", 0x7FF0000000000000, 0x7FF0000000000000),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "MXFP8": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
}
"""For each float dtype: NumPy's unsigned integer of the same width, a mask, and the least masked word that is infinity
or NaN. In these, all exponent bits are set. F8_E4M3, which MXFP8's numbers are, has no infinity; all bits besides the
sign are set in its NaN. F8_E8M0 is an exponent."""


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
        self.blake3.update(f"{location.name}\0{location.dtype}\0{','.join(map(str, location.shape))}\0".encode())
        fast = xxhash.xxh3_128()
        block = BLOCKS.get(location.dtype)
        # A chunk holds whole numbers, or whole blocks of them. A tensor in another layout is one chunk, because it
        # moves as a whole.
        chunk = CHUNK_BYTES if block is None else CHUNK_BYTES // block.nbytes * block.nbytes
        if location.transpose or location.swap_halves:
            chunk = location.nbytes
        for at in range(0, location.nbytes, max(chunk, 1)):
            data = read_exactly(
                descriptor, location.path, location.label, location.offset + at, min(chunk, location.nbytes - at)
            )
            fast.update(data)
            if not _are_finite(data, location.dtype):
                what = "holds NaN or infinity" if block is None else "has a scale that is NaN or infinity"
                raise CorruptFileError(location.path, f"tensor {location.label} {what}")
            self.blake3.update(
                in_module_order(data, location.dtype, location.shape, location.transpose, location.swap_halves)
            )
            if self._progress is not None:
                self._progress(len(data))
        return fast.hexdigest()

    def beside(self, descriptor: int, tensor: Beside) -> str:
        """Return the XXH3-128 (hex) of a tensor beside a packed one, and update the BLAKE3.

        Raises CorruptFileError if the file is too short, or the tensor holds NaN or infinity.
        """
        data = read_exactly(descriptor, tensor.path, tensor.name, tensor.offset, tensor.nbytes)
        if not _are_finite(data, tensor.dtype):
            raise CorruptFileError(tensor.path, f"tensor {tensor.name} holds NaN or infinity")
        self.blake3.update(f"{tensor.kind}\0{tensor.dtype}\0".encode())
        self.blake3.update(data)
        if self._progress is not None:
            self._progress(len(data))
        return xxhash.xxh3_128(data).hexdigest()


def _are_finite(data: bytes, form: str) -> bool:
    """Return whether no number is NaN or infinity. ``data``: whole elements or blocks."""
    # Not above: commands that only list models import this module.
    import numpy as np

    if form in BLOCKS:
        block = BLOCKS[form]
        rows = np.frombuffer(data, np.uint8).reshape(-1, block.nbytes)
        scales = (rows[:, at : at + 2].copy().view("<u2") for at in block.scales)
        return not any(((words & _HALF_EXPONENT) == _HALF_EXPONENT).any() for words in scales)
    word, mask, first_wrong = _WORDS.get(form, ("u1", 0, 1))
    return not ((np.frombuffer(data, word) & mask) >= first_wrong).any()


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


def hash_texts(*parts: str) -> str:
    """Return the BLAKE3 (hex) of texts, each followed by a zero byte."""
    return blake3("".join(f"{part}\0" for part in parts).encode()).hexdigest()


def hash_bytes(data: bytes) -> str:
    """Return the BLAKE3 (hex) of bytes."""
    return blake3(data).hexdigest()
