"""The tokens of an image in FLUX.1, Chroma and others: squares of latents, with a position on each of three axes."""

from __future__ import annotations

from collections.abc import Callable

PATCH = 2
"""Latents per token in each direction."""


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the picture's number, the row and the column.

    Of the published 128 they are 16, 56 and 56.
    """
    side = (head_size - head_size // 8) // 2
    return head_size // 8, side, side


def shift_by_size(fewest: tuple[int, float], most: tuple[int, float]) -> Callable[[int, int], float]:
    """Return the shift of the noise levels as a function of an image's tokens: a line through two points.

    ``fewest``, ``most``: (tokens, shift), as diffusers' ``calculate_shift`` takes them.
    The function also takes the number of steps, which changes nothing.
    """

    def mu(tokens: int, steps: int) -> float:
        del steps
        # In the order of diffusers, for the last bit.
        slope = (most[1] - fewest[1]) / (most[0] - fewest[0])
        return tokens * slope + (fewest[1] - slope * fewest[0])

    return mu
