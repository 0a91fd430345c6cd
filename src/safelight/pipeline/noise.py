"""Noise from one CPU generator per image, and noise interpolated between two seeds."""

from __future__ import annotations

import math

import torch


def draw_seeded_noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Draw standard normal noise, in fp32 on the CPU, so that it is the same for every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).to(device)


class Variation:
    """Interpolates noise towards the noise of ``seed``. ``strength``: 0 (unchanged) to 1 (the noise of ``seed``)."""

    def __init__(self, seed: int, strength: float) -> None:
        self._seed, self._strength = seed, strength

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the interpolated noise, with the same shape, dtype and device."""
        other = draw_seeded_noise(tuple(noise.shape), self._seed, torch.float32, torch.device("cpu"))
        return slerp(noise.float().cpu(), other, self._strength).to(noise.dtype).to(noise.device)


def slerp(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Interpolate spherically between two fp32 tensors (Shoemake 1985). The variance of noise stays 1.

    ``share``: 0 (``one``) to 1 (``other``).
    """
    cosine = float((one.flatten() @ other.flatten()) / (one.norm() * other.norm()))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return torch.lerp(one, other, share)
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)
