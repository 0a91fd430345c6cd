"""The tokens of an image in FLUX.1 and Qwen-Image: squares of latents, with a position on each of three axes."""

from __future__ import annotations

PATCH = 2
"""Latents per token in each direction."""


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the picture's number, the row and the column.

    Of the published 128 they are 16, 56 and 56.
    """
    side = (head_size - head_size // 8) // 2
    return head_size // 8, side, side
