"""Sizes of images. No torch."""

from __future__ import annotations

from safelight.formats.layout import LATENT_SCALE


def enlarged(pixels: int, scale: float) -> int:
    """Pixels, a multiple of 8, as near as can be to ``scale`` times as many."""
    return max(LATENT_SCALE, round(pixels * scale / LATENT_SCALE) * LATENT_SCALE)
