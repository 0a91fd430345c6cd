"""Previews: what latents look like, by a linear map from their channels to colours.

Each VAE has a map of its own, fitted to the images that it decoded (least squares). Before its first image, the
family's map is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safelight.request.results import Preview


class Previews:
    """Draws previews, and learns how each VAE's latents look."""

    def __init__(self) -> None:
        self._maps: dict[str, torch.Tensor] = {}

    def of(self, vae_digest: str, latents: torch.Tensor, latent_rgb_factors: Sequence[Sequence[float]]) -> Preview:
        """Draw a preview.

        ``latents``: (1, channels, h, w), on any device.
        ``latent_rgb_factors``: the family's map, :attr:`safelight.families.family.Latents.latent_rgb_factors`.
        """
        values = _features(latents)
        _, channels, height, width = latents.shape
        known = self._maps.get(vae_digest)
        painted = values @ (_default_map(latent_rgb_factors, channels) if known is None else known)
        pixels = painted.clamp(0, 1).mul(255).round().to(torch.uint8)
        return Preview(pixels.contiguous().numpy().tobytes(), width, height)

    def learn(self, vae_digest: str, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        """Fit the VAE's map to an image that it decoded. ``pixels``: uint8 (height, width, 3)."""
        if vae_digest in self._maps:
            return
        _, _, height, width = latents.shape
        small = pixels.float().div(255).permute(2, 0, 1)[None]
        wanted = torch.nn.functional.interpolate(small, (height, width), mode="area")[0].flatten(1).t()
        self._maps[vae_digest] = torch.linalg.lstsq(_features(latents), wanted, driver="gelsd").solution


def _default_map(latent_rgb_factors: Sequence[Sequence[float]], channels: int) -> torch.Tensor:
    """Return the family's map; without one, grey that follows the mean of the channels."""
    if latent_rgb_factors:
        return torch.tensor(latent_rgb_factors)
    return torch.cat([torch.full((channels, 3), 0.5 / channels), torch.full((1, 3), 0.5)])


def _features(latents: torch.Tensor) -> torch.Tensor:
    """Return the channels and a constant, fp32, (h * w, channels + 1)."""
    values = latents[0].detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).flatten(1).t()
    return torch.cat([values, torch.ones(len(values), 1)], 1)
