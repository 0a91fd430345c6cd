"""Previews: what latents look like, by a linear map from their channels to colours.

Each VAE has a map of its own, fitted to the images that it decoded (least squares); before its first image, that of
Stable Diffusion 1 is used.
"""

from __future__ import annotations

import torch

from safelight.request.results import Preview

_FIRST = torch.tensor(
    [
        [0.298, 0.207, 0.208],
        [0.187, 0.286, 0.173],
        [-0.158, 0.189, 0.264],
        [-0.184, -0.271, -0.473],
        [0.5, 0.5, 0.5],
    ]
)
"""(5, 3): latent channels and a constant to red, green, blue from 0 to 1; SD 1's, widely used for this purpose."""

_SCALE = 2.0
"""The map above gives -1 to 1 about its constant."""


class Previews:
    """Draws previews, and learns how each VAE's latents look."""

    def __init__(self) -> None:
        self._maps: dict[str, torch.Tensor] = {}

    def of(self, vae: str, latents: torch.Tensor) -> Preview:
        """``latents``: (1, 4, h, w), on any device. ``vae``: the VAE's digest."""
        values = _columns(latents)
        _, _, height, width = latents.shape
        colours = values @ self._maps.get(vae, _FIRST_SCALED)
        pixels = colours.clamp(0, 1).mul(255).round().to(torch.uint8)
        return Preview(pixels.contiguous().numpy().tobytes(), width, height)

    def learn(self, vae: str, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        """Fit the VAE's map to an image that it decoded. ``pixels``: uint8 (8h, 8w, 3)."""
        if vae in self._maps:
            return
        _, _, height, width = latents.shape
        small = pixels.float().div(255).permute(2, 0, 1)[None]
        wanted = torch.nn.functional.interpolate(small, (height, width), mode="area")[0].flatten(1).t()
        self._maps[vae] = torch.linalg.lstsq(_columns(latents), wanted, driver="gelsd").solution


_FIRST_SCALED = _FIRST * torch.tensor([[1 / _SCALE]] * 4 + [[1.0]])


def _columns(latents: torch.Tensor) -> torch.Tensor:
    """(h * w, 5) fp32: the channels and a constant."""
    values = latents[0].detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).flatten(1).t()
    return torch.cat([values, torch.ones(len(values), 1)], 1)
