"""Measures the difference of two images. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two images.

    ``largest``, ``mean``: absolute difference of channels, 0 to 255.
    ``similarity``: structural similarity (Wang et al. 2004) of their luminance; 1 if they are equal.
    """

    largest: int
    mean: float
    similarity: float

    def __str__(self) -> str:
        return f"at most {self.largest} of 255, {self.mean:.2f} on average, structural similarity {self.similarity:.3f}"


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Difference:
    """Measure the difference of two images of the same size, uint8 (h, w, 3)."""
    apart = np.abs(one.astype(np.int16) - other.astype(np.int16))
    return Difference(int(apart.max()), float(apart.mean()), _similarity(_luminance(one), _luminance(other)))


def _luminance(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _similarity(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the SSIM over windows of 8 × 8 pixels, with the constants of the paper."""
    from scipy.ndimage import uniform_filter

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = uniform_filter(a, 8), uniform_filter(b, 8)
    var_a = uniform_filter(a * a, 8) - mean_a**2
    var_b = uniform_filter(b * b, 8) - mean_b**2
    both = uniform_filter(a * b, 8) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
