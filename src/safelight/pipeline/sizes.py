"""Sizes of images. No torch."""

from __future__ import annotations


def enlarged(pixels: int, scale: float, multiple: int) -> int:
    """Return ``pixels`` times ``scale``, rounded to a multiple of ``multiple`` pixels, at least that."""
    return max(multiple, round(pixels * scale / multiple) * multiple)
