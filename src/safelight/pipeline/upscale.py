"""Enlarges latents or pixels for the hires fix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image as PILImage

LATENT = {"latent": "bilinear", "latent-nearest": "nearest-exact", "latent-bicubic": "bicubic"}
PIXELS = {"lanczos": PILImage.Resampling.LANCZOS, "nearest": PILImage.Resampling.NEAREST}


def lay_out_patches(values: torch.Tensor, patch: int) -> torch.Tensor:
    """Convert latents (1, channels, h, w) to (1, channels / patch², h * patch, w * patch).

    ``patch``: see :class:`safelight.families.family.Latents`.
    """
    return F.pixel_shuffle(values, patch) if patch > 1 else values


def resize_latents(values: torch.Tensor, width: int, height: int, name: str, patch: int = 1) -> torch.Tensor:
    """Resize latents (1, channels, h, w) to (1, channels, ``height``, ``width``). Sizes are in latents."""
    plain = lay_out_patches(values.float(), patch)
    larger = F.interpolate(plain, (height * patch, width * patch), mode=LATENT[name]).to(values.dtype)
    return F.pixel_unshuffle(larger, patch) if patch > 1 else larger


def resize_picture(image: PILImage.Image, width: int, height: int, name: str) -> PILImage.Image:
    """Resize an image to ``width`` × ``height`` pixels."""
    return image.resize((width, height), PIXELS[name])
