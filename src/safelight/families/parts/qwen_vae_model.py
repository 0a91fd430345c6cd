"""Builds Qwen-Image's VAE, and converts between its latents and those that the denoiser sees."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safelight.boundary import modules, pictures
from safelight.boundary.pictures import EncodedPicture, PointDistribution
from safelight.families.parts.qwen_vae import LATENTS_MEAN, LATENTS_STD, QWEN_LATENTS, QwenVAEConfig

AUTOENCODER = "diffusers.models.autoencoders.autoencoder_kl_qwenimage:AutoencoderKLQwenImage"


def autoencoder(config: QwenVAEConfig) -> nn.Module:
    """Build a VAE on the current default device. It is for single frames: it has no convolutions over frames."""
    return modules.library_class(AUTOENCODER)(
        base_dim=config.width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.layers_per_block,
        temperal_downsample=[False] * (len(config.multipliers) - 1),
        input_channels=config.in_channels,
    )


@dataclass(frozen=True, slots=True)
class NormalisedDistribution:
    """The distribution over normalised latents (n, channels, h, w).

    ``own``: that of the VAE, whose latents have an axis of frames.
    ``dtype``: of the normalisation; None for that of the VAE's latents.
    ``divides``: latents are divided by the deviation, not multiplied by its inverse. The last bits differ.
    """

    own: Any
    dtype: torch.dtype | None = None
    divides: bool = False

    @property
    def parameters(self) -> torch.Tensor:
        return self.own.parameters

    def mode(self) -> torch.Tensor:
        return _normalise(self.own.mode(), self.dtype, self.divides)

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        return _normalise(self.own.sample(generator), self.dtype, self.divides)


def encode_picture(
    vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int, divides: bool = False
) -> list[EncodedPicture]:
    """Encode a picture to normalised latents; see :func:`safelight.boundary.pictures.encode_picture`.

    ``divides``: as in :class:`NormalisedDistribution`.
    """
    with _without_features(vae):
        found = pictures.encode_picture(vae, picture, mask, device, QWEN_LATENTS.vae_scale_factor, tile, frames=True)
    return [EncodedPicture(one.shown, NormalisedDistribution(one.distribution, None, divides)) for one in found]


def encode_control_picture(vae: nn.Module, picture: Any, device: torch.device, tile: int) -> EncodedPicture:
    """Encode a ControlNet's picture to latents that are normalised in fp32, as diffusers' ControlNet pipelines do."""
    scale = QWEN_LATENTS.vae_scale_factor
    with _without_features(vae):
        found = pictures.encode_control_picture(vae, picture, device, scale, tile, frames=True)
    return EncodedPicture(found.shown, NormalisedDistribution(found.distribution, torch.float32))


def encode_reference(vae: nn.Module, picture: Any, device: torch.device, tile: int) -> EncodedPicture:
    """Encode a reference image to normalised latents, which are the most likely; see :func:`encode_picture`."""
    # diffusers' pipelines divide here, and multiply in other places.
    [found] = encode_picture(vae, picture, None, device, tile, divides=True)
    return EncodedPicture(found.shown, PointDistribution(found.distribution.mode()))


def decode(vae: nn.Module, latents: torch.Tensor, tile: int) -> torch.Tensor:
    """Decode normalised latents (n, channels, h, w) to (n, 3, height, width), -1 to 1."""
    mean, scale = _statistics(latents)
    with _without_features(vae):
        # Convolutions compute other bits for channels-last latents.
        plain = (latents / scale + mean).contiguous()
        return pictures.decode(vae, plain, QWEN_LATENTS.vae_scale_factor, tile, frames=True)


@contextmanager
def _without_features(vae: nn.Module) -> Generator[None]:
    """Remove the features that the VAE keeps in attributes for a next frame, also after an error."""
    before = set(vars(vae))
    try:
        yield
    finally:
        for name in vars(vae).keys() - before:
            delattr(vae, name)


def _normalise(latents: torch.Tensor, dtype: torch.dtype | None, divides: bool = False) -> torch.Tensor:
    """Normalise the VAE's latents (n, channels, 1, h, w). Returns (n, channels, h, w).

    ``dtype``, ``divides``: as in :class:`NormalisedDistribution`.
    """
    latents = latents.to(dtype or latents.dtype)
    mean, deviation = _mean_and_deviation(latents)
    centred = latents.squeeze(2) - mean
    return centred / deviation if divides else centred * (1.0 / deviation)


def _statistics(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each channel's mean, and one by its standard deviation, (1, channels, 1, 1), in the latents' dtype."""
    mean, deviation = _mean_and_deviation(latents)
    return mean, 1.0 / deviation


def _mean_and_deviation(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each channel's mean and standard deviation, (1, channels, 1, 1), in the latents' dtype."""
    mean, deviation = (
        torch.tensor(one).view(1, -1, 1, 1).to(latents.device, latents.dtype) for one in (LATENTS_MEAN, LATENTS_STD)
    )
    return mean, deviation
