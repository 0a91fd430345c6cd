"""Checksums of bytes in memory: sums of 64-bit words modulo 2^64, plain and weighted.

The plain sum detects every changed word. The weighted sum also detects rows of words (8 KiB) that changed places. Both
are integer sums, so every device gets the same result, in any order of addition.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

ROW_BYTES = 8192
_WORDS = ROW_BYTES // 8
_MODULUS = 1 << 64

Sum = tuple[int, int]
"""(plain, weighted by row), each modulo 2^64."""


class RunningSum:
    """Computes a sum piece by piece. Each piece except the last must be a whole number of rows."""

    def __init__(self) -> None:
        self._plain = 0
        self._weighted = 0
        self._row = 0

    def add(self, piece: torch.Tensor) -> None:
        """Add ``piece``: uint8, contiguous, (n,), on any device."""
        if piece.storage_offset() % 8:
            piece = piece.clone()
        whole = piece.numel() // ROW_BYTES * ROW_BYTES
        if whole:
            self._rows(piece[:whole].view(torch.int64).view(-1, _WORDS).sum(1))
        if whole < piece.numel():
            last = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=piece.device)
            last[: piece.numel() - whole] = piece[whole:]
            self._rows(last.view(torch.int64).view(1, _WORDS).sum(1))

    def _rows(self, sums: torch.Tensor) -> None:
        sums = sums.cpu()
        weights = torch.arange(self._row + 1, self._row + 1 + sums.numel(), device="cpu")
        self._plain += int(sums.sum())
        self._weighted += int((sums * weights).sum())
        self._row += sums.numel()

    def value(self) -> Sum:
        return self._plain % _MODULUS, self._weighted % _MODULUS


def compute_sum(tensor: torch.Tensor) -> Sum:
    """Return the sum of a contiguous tensor's bytes, on any device."""
    running = RunningSum()
    if tensor.numel():
        running.add(tensor.view(-1).view(torch.uint8))
    return running.value()


def combined(sums: Iterable[Sum]) -> Sum:
    """Combine the sums of several tensors into one, which depends on their order."""
    plain = weighted = 0
    for number, (a, b) in enumerate(sums, 1):
        plain, weighted = plain + a, weighted + number * b
    return plain % _MODULUS, weighted % _MODULUS
