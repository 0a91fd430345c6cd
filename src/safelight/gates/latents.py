"""What conditioning and latents must pass: finite, and within what the sampler's noise level allows.

One reduction a step: the largest absolute value is NaN when any value is, and infinite when any is.
"""

from __future__ import annotations

import math

import torch

from safelight.errors import NotFiniteError

NOISE = 12.0
"""Standard deviations of noise: among a billion values the largest is about 6."""

SIGNAL = 150.0
"""The largest latents without noise; those of Stable Diffusion stay below about 30, at extreme guidance below 80."""


def highest(values: torch.Tensor) -> float:
    """The largest absolute value; NaN or infinity when any is."""
    return float(values.detach().abs().amax())


def finite(values: torch.Tensor, stage: str, dtype: str) -> float:
    """The largest absolute value. Raises NotFiniteError: ``stage`` gave NaN or infinity in ``dtype``."""
    found = highest(values)
    if not math.isfinite(found):
        raise NotFiniteError(stage, dtype)
    return found


def allowed(sigma: float) -> float:
    """The largest latents at a noise level of ``sigma`` (1 for samplers that keep the variance)."""
    return SIGNAL + NOISE * max(1.0, sigma)
