"""The gate for conditioning and latents (values must be finite), and the limit above which latents are suspicious.

An image with suspicious latents gets a mark. Both checks need only one reduction per step: the largest absolute value
is NaN or infinite if any value is.
"""

from __future__ import annotations

import math

import torch

from safelight.errors import NotFiniteError

MAX_NOISE_SIGMAS = 12.0
"""The largest allowed noise, in standard deviations. The largest of a billion values is about 6."""


def largest_magnitude(values: torch.Tensor) -> float:
    """Return the largest absolute value. It is NaN or infinity if any value is."""
    return float(values.detach().abs().amax())


def require_finite(values: torch.Tensor, stage: str, dtype: str) -> float:
    """Return the largest absolute value.

    Raises NotFiniteError, which names ``stage`` and ``dtype``, if it is NaN or infinity.
    """
    found = largest_magnitude(values)
    if not math.isfinite(found):
        raise NotFiniteError(stage, dtype)
    return found


def largest_allowed(sigma: float, signal: float) -> float:
    """Return the largest allowed latents at noise level ``sigma`` (1 for variance-preserving samplers).

    ``signal``: the largest allowed latents without noise; the family says it.
    """
    return signal + MAX_NOISE_SIGMAS * max(1.0, sigma)
