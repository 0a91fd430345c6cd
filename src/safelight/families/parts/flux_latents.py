"""The latents of FLUX.1's VAE, which Z-Image and other families share."""

from __future__ import annotations

from safelight.families.family import SUSPICIOUS_ABOVE_IF_NORMALISED, Latents
from safelight.families.parts import preview_colours
from safelight.families.parts.vae import VAEConfig

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159

FLUX_VAE = VAEConfig(3, 3, 16, (128, 256, 512, 512), 2, quantised=False)

FLUX_LATENTS = Latents(
    channels=16,
    vae_scale_factor=8,
    multiple=16,
    scaling_factor=SCALING_FACTOR,
    shift_factor=SHIFT_FACTOR,
    latent_rgb_factors=preview_colours.FLUX,
    suspicious_above=SUSPICIOUS_ABOVE_IF_NORMALISED,
    fp32=True,
)
"""Each token of the transformer has two by two latents, so sides are multiples of 16 pixels."""
