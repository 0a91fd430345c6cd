"""Builds the VAE of :mod:`safelight.families.parts.vae`."""

from __future__ import annotations

from torch import nn

from safelight.boundary import modules
from safelight.families.family import Family
from safelight.families.parts.vae import NORM_GROUPS, VAEConfig


def autoencoder(family: Family, config: VAEConfig) -> nn.Module:
    """Build a VAE on the current default device."""
    levels = len(config.block_out_channels)
    return modules.KL_AUTOENCODER(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=family.latents.scaling_factor,
        shift_factor=family.latents.shift_factor or None,
        use_quant_conv=config.quantised,
        use_post_quant_conv=config.quantised,
    )
