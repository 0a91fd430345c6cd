"""Enlarges latents or pixels for the hires fix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image as PILImage

LATENT = {"latent": "bilinear", "latent-nearest": "nearest-exact", "latent-bicubic": "bicubic"}
PIXELS = {"lanczos": PILImage.Resampling.LANCZOS, "nearest": PILImage.Resampling.NEAREST}


def resize_latents(values: torch.Tensor, width: int, height: int, name: str) -> torch.Tensor:
    """Resize latents (1, 4, h, w) to (1, 4, ``height``, ``width``). Sizes are in latents."""
    return F.interpolate(values.float(), (height, width), mode=LATENT[name]).to(values.dtype)


def resize_picture(image: PILImage.Image, width: int, height: int, name: str) -> PILImage.Image:
    """Resize an image to ``width`` × ``height`` pixels."""
    return image.resize((width, height), PIXELS[name])
