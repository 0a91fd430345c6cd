"""Builds FLUX.2's VAE, and converts between its latents and those that the denoiser sees."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from safelight.boundary import modules, pictures
from safelight.boundary.pictures import EncodedPicture, PointDistribution
from safelight.families.parts.flux2_vae import NORM_EPSILON, PATCH, VAE_SCALE_FACTOR, Flux2VAEConfig
from safelight.families.parts.vae import NORM_GROUPS

AUTOENCODER = "diffusers.models.autoencoders.autoencoder_kl_flux2:AutoencoderKLFlux2"


def autoencoder(config: Flux2VAEConfig) -> nn.Module:
    """Build a VAE on the current default device."""
    levels = len(config.block_out_channels)
    module = modules.library_class(AUTOENCODER)(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=NORM_GROUPS,
        batch_norm_eps=NORM_EPSILON,
        patch_size=(PATCH, PATCH),
    )
    # torch keeps the statistics as buffers, but here they are weights: files have them, and nothing updates them. As
    # parameters they are verified, bound and removed like all weights. The count of batches is not read.
    for name in ("running_mean", "running_var"):
        values = module.bn._buffers.pop(name)
        module.bn.register_parameter(name, nn.Parameter(values, requires_grad=False))
    del module.bn.num_batches_tracked
    return module


def encode_picture(
    vae: nn.Module, picture: Any, mask: Any | None, device: torch.device, tile: int, epsilon: float = NORM_EPSILON
) -> list[EncodedPicture]:
    """Encode a picture to latents as the denoiser sees them; see :func:`safelight.boundary.pictures.encode_picture`.

    diffusers' pipelines take the most likely latents, so nothing is drawn.

    ``epsilon``: what is added to the variance of each channel.
    """
    encoded = pictures.encode_picture(vae, picture, mask, device, VAE_SCALE_FACTOR, tile)
    return [
        EncodedPicture(one.shown, PointDistribution(_normalise(vae, one.distribution.mode(), epsilon)))
        for one in encoded
    ]


def decode(vae: nn.Module, latents: torch.Tensor, tile: int, epsilon: float = NORM_EPSILON) -> torch.Tensor:
    """Decode latents as the denoiser sees them to (n, 3, height, width), about -1 to 1.

    ``epsilon``: as in :func:`encode_picture`.
    """
    mean, deviation = _statistics(vae, latents, epsilon)
    plain = F.pixel_shuffle(latents * deviation + mean, PATCH)
    return pictures.decode(vae, plain, VAE_SCALE_FACTOR, tile)


def _normalise(vae: nn.Module, latents: torch.Tensor, epsilon: float) -> torch.Tensor:
    patches = F.pixel_unshuffle(latents, PATCH)
    mean, deviation = _statistics(vae, patches, epsilon)
    return (patches - mean) / deviation


def _statistics(vae: nn.Module, latents: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel, (1, channels, 1, 1), in the dtype of the latents.

    Both are copies: a view would keep the memory of a streamed segment while the VAE computes.
    """
    norm = cast("Any", vae).bn
    mean = norm.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype, copy=True)
    deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + epsilon)
    return mean, deviation.to(latents.device, latents.dtype)
