"""Noise levels spread by a beta distribution (Lee et al. 2024, arXiv 2407.12173), as diffusers' ``use_beta_sigmas``.

diffusers takes the quantiles from scipy, which the core does not install.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHAPE = 0.6
"""Both parameters of the distribution, diffusers' default: more steps at the highest and the lowest noise levels."""

_BETA = math.gamma(SHAPE) ** 2 / math.gamma(2 * SHAPE)

_LEAST_TERM = 1e-18
"""A term of the series that is smaller than this, relative to the sum, does not change a number of 64 bits."""


def spread(levels: Sequence[float]) -> list[float]:
    """Return as many noise levels as in ``levels``, with the same first and last one."""
    first, last = (float(np.float32(levels[at])) for at in (0, -1))
    return [last + quantile(share) * (first - last) for share in (1 - np.linspace(0, 1, len(levels))).tolist()]


def quantile(share: float) -> float:
    """Return below which number a ``share`` (0 to 1) of the distribution lies."""
    if share > 0.5:
        return 1 - quantile(1 - share)
    low, high = 0.0, 0.5
    while low < (middle := (low + high) / 2) < high:
        if _share_below(middle) < share:
            low = middle
        else:
            high = middle
    return high if share > 0 else 0.0


def _share_below(x: float) -> float:
    """Return which share of the distribution lies below ``x``, 0 to 0.5 (Abramowitz and Stegun 1964, 26.5.4)."""
    term = total = 1.0
    order = 0
    while term > _LEAST_TERM * total:
        term *= x * (2 * SHAPE + order) / (SHAPE + 1 + order)
        total += term
        order += 1
    return x**SHAPE * (1 - x) ** SHAPE * total / (SHAPE * _BETA)
