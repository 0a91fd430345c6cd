"""From pictures to latents and back, by a VAE."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn


@dataclass(frozen=True)
class Encoded:
    """``shown`` (1, 3, h, w), -1 to 1, and diffusers' ``distribution`` over its latents."""

    shown: torch.Tensor
    distribution: Any

    @property
    def numbers(self) -> torch.Tensor:
        return self.distribution.parameters


@contextmanager
def _tiled(module: nn.Module, tile: int) -> Generator[Any]:
    """The VAE, which within the context works by squares of ``tile`` pixels a side where it is shown more; 0: never.
    Flags that were left set would be seen when the binding ends (STATE 24)."""
    vae = cast("Any", module)
    if not tile:
        yield vae
        return
    values = {"use_tiling": True, "tile_sample_min_size": tile, "tile_latent_min_size": tile // 8}
    before = {name: getattr(vae, name) for name in values}
    try:
        for name, value in values.items():
            setattr(vae, name, value)
        yield vae
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def encode_picture(
    module: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int = 0
) -> list[Encoded]:
    """What a bound VAE makes of a picture, and of it where the mask is black, as the pipelines ask for them; by squares
    of ``tile`` pixels a side, 0 for all at once."""
    image = VaeImageProcessor(vae_scale_factor=8).preprocess(picture).to(device)
    pictures = [image]
    if mask is not None:
        masks = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        pictures.append(image * (masks.preprocess(mask).to(device) < 0.5))
    with _tiled(module, tile) as vae:
        return [Encoded(shown, vae.encode(shown.to(vae.dtype)).latent_dist) for shown in pictures]


def crop_region(mask: Any, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """The part of a mask's image (left, top, right, bottom) in which something is white, with ``padding`` pixels around
    it, grown to the shape of ``width`` by ``height``."""
    return VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)


def decode(module: nn.Module, latents: torch.Tensor, tile: int = 0) -> torch.Tensor:
    """Latents (n, 4, h, w) to what the VAE gives for them: about -1 to 1, (n, 3, 8h, 8w); by squares of ``tile`` pixels
    a side, 0 for all at once."""
    with _tiled(module, tile) as vae:
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def to_pixels(raw: torch.Tensor) -> torch.Tensor:
    """A VAE's output to images, uint8 (n, h, w, 3), rounded as diffusers' image processor rounds."""
    values = cast("torch.Tensor", VaeImageProcessor.denormalize(raw))
    values = values.cpu().permute(0, 2, 3, 1).float()
    return (values * 255).round().to(torch.uint8)
