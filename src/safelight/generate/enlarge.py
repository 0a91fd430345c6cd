"""What was drawn, larger, for high-resolution fix: its latents, or its pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image as PILImage

LATENT = {"latent": "bilinear", "latent-nearest": "nearest-exact", "latent-bicubic": "bicubic"}
PIXELS = {"lanczos": PILImage.Resampling.LANCZOS, "nearest": PILImage.Resampling.NEAREST}


def latents(values: torch.Tensor, width: int, height: int, name: str) -> torch.Tensor:
    """Latents (1, 4, h, w) as (1, 4, ``height``, ``width``)."""
    return F.interpolate(values.float(), (height, width), mode=LATENT[name]).to(values.dtype)


def picture(image: PILImage.Image, width: int, height: int, name: str) -> PILImage.Image:
    """The image in that size."""
    return image.resize((width, height), PIXELS[name])
