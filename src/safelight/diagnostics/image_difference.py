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
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _means(a), _means(b)
    var_a = _means(a * a) - mean_a**2
    var_b = _means(b * b) - mean_b**2
    both = _means(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


_WINDOW = 8


def _means(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the mean of the window around each value, (h, w). Beyond the border, values are mirrored.

    It equals ``scipy.ndimage.uniform_filter`` to rounding, without scipy, which the core does not install.
    """
    padded = np.pad(values, (_WINDOW // 2, _WINDOW // 2 - 1), "symmetric")
    for axis in (0, 1):
        padded = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW, axis).mean(-1)
    return padded
