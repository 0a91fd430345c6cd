"""Encodes pictures to latents and decodes latents to pixels, with a VAE."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture.

    ``shown``: the picture, (1, 3, h, w), -1 to 1.
    ``distribution``: diffusers' distribution over its latents.
    """

    shown: torch.Tensor
    distribution: Any

    @property
    def values(self) -> torch.Tensor:
        return self.distribution.parameters


@dataclass(frozen=True, slots=True)
class PointDistribution:
    """A distribution with a single value. ``parameters``: the value. It draws no random numbers."""

    parameters: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.parameters

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        del generator
        return self.parameters


@contextmanager
def _tiled(module: nn.Module, tile: int, scale: int) -> Generator[Any]:
    """Let the VAE work in tiles within the context.

    ``tile``: side length of a tile in pixels, 0 for no tiling.

    The flags are restored afterwards. Otherwise the end of the binding would report them as changes (STATE 24).
    """
    vae = cast("Any", module)
    if not tile:
        yield vae
        return
    values = _tile_settings(vae, tile, scale)
    before = {name: getattr(vae, name) for name in values}
    try:
        for name, value in values.items():
            setattr(vae, name, value)
        yield vae
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _tile_settings(vae: Any, tile: int, scale: int) -> dict[str, Any]:
    """Return the attributes that let a VAE of diffusers work in tiles. A quarter of a tile overlaps the next one."""
    if not hasattr(vae, "tile_sample_min_height"):
        return {"use_tiling": True, "tile_sample_min_size": tile, "tile_latent_min_size": tile // scale}
    stride = tile * 3 // 4 // scale * scale
    sizes = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
    strides = {f"tile_sample_stride_{side}": stride for side in ("height", "width")}
    return {"use_tiling": True, **sizes, **strides}


def encode_picture(
    module: nn.Module,
    picture: Any,
    mask: Any | None,
    device: torch.device,
    scale: int,
    tile: int = 0,
    frames: bool = False,
) -> list[EncodedPicture]:
    """Encode a picture with a bound VAE.

    ``mask``: if given, the result has a second item: the picture where the mask is black.
    ``scale``: pixels per latent in each direction.
    ``tile``: side length of a tile in pixels, 0 for no tiling.
    ``frames``: the VAE is for videos. It gets the picture as one frame, and its latents have an axis of frames, too.
    """
    image = VaeImageProcessor(vae_scale_factor=scale).preprocess(picture).to(device)
    pictures = [image]
    if mask is not None:
        pictures.append(image * (binary_mask(mask, scale).to(device) < 0.5))
    with _tiled(module, tile, scale) as vae:
        inputs = [shown.to(vae.dtype).unsqueeze(2) if frames else shown.to(vae.dtype) for shown in pictures]
        return [EncodedPicture(shown, vae.encode(one).latent_dist) for shown, one in zip(pictures, inputs, strict=True)]


def resize(picture: Any, size: tuple[int, int]) -> Any:
    """Resize a PIL picture as diffusers' image processors do. ``size``: (width, height)."""
    width, height = size
    return VaeImageProcessor().resize(picture, height, width)


def encode_control_picture(
    module: nn.Module, picture: Any, device: torch.device, scale: int, tile: int = 0, frames: bool = False
) -> EncodedPicture:
    """Encode a ControlNet's picture with a bound VAE. Arguments as in :func:`encode_picture`."""
    # Contiguous, as diffusers has it here: convolutions compute other bits for channels-last pictures.
    shown = control_picture(picture, scale, normalised=True).to(device)
    with _tiled(module, tile, scale) as vae:
        given = shown.to(vae.dtype)
        return EncodedPicture(shown, vae.encode(given.unsqueeze(2) if frames else given).latent_dist)


def crop_region(mask: Any, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """Return the region (left, top, right, bottom) of a mask that contains all white pixels.

    ``padding``: pixels to add around it.
    ``width``, ``height``: the region grows to this aspect ratio.
    """
    return VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)


def decode(module: nn.Module, latents: torch.Tensor, scale: int, tile: int = 0, frames: bool = False) -> torch.Tensor:
    """Decode unscaled latents (n, channels, h, w) with a VAE. Returns (n, 3, h * scale, w * scale), about -1 to 1.

    ``tile``: side length of a tile in pixels, 0 for no tiling.
    ``frames``: the VAE is for videos.
    """
    with _tiled(module, tile, scale) as vae:
        if frames:
            return vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
        return vae.decode(latents, return_dict=False)[0]


def binary_mask(mask: Any, scale: int) -> torch.Tensor:
    """Convert a PIL mask to 0 and 1, fp32, (1, 1, height, width)."""
    processor = VaeImageProcessor(
        vae_scale_factor=scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return processor.preprocess(mask)


def control_picture(picture: Any, scale: int, normalised: bool = False) -> torch.Tensor:
    """Convert a PIL picture to what a ControlNet is shown, fp32, (1, 3, height, width), contiguous.

    ``normalised``: from -1 to 1 instead of from 0 to 1.
    """
    processor = VaeImageProcessor(vae_scale_factor=scale, do_convert_rgb=True, do_normalize=normalised)
    return processor.preprocess(picture).contiguous()


def to_pixels(raw: torch.Tensor) -> torch.Tensor:
    """Convert a VAE's output to images, uint8, (n, h, w, 3), with the rounding of diffusers' image processor."""
    values = cast("torch.Tensor", VaeImageProcessor.denormalize(raw))
    values = values.cpu().permute(0, 2, 3, 1).float()
    return (values * 255).round().to(torch.uint8)
