"""FLUX.2's VAE (``diffusers.AutoencoderKLFlux2``): the table of its tensors, and the form of its latents.

It is an ``AutoencoderKL`` with the mean and the variance of each channel of its latents (``bn``). The denoiser sees
latents of two by two places as one place with four times the channels, and each channel normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.family import SUSPICIOUS_ABOVE_IF_NORMALISED, Latents
from safelight.families.parts import preview_colours, vae
from safelight.families.parts.vae import VAEConfig
from safelight.families.tables import Shapes, TensorRow, TensorSource, row

PATCH = 2
"""Places of the VAE's latents in one place of the denoiser's latents, in each direction."""

VAE_SCALE_FACTOR = 8
"""Pixels per place of the VAE's latents in each direction."""

NORM_EPSILON = 1e-4

_STATISTICS = ("bn.running_mean", "bn.running_var")

_INNER = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
"""Two convolutions that the original has inside the encoder and the decoder."""


@dataclass(frozen=True, slots=True)
class Flux2VAEConfig(Config):
    """Settings of FLUX.2's VAE. ``latent_channels``: of the VAE. The denoiser sees four times as many."""

    architecture: ClassVar[str] = "flux2-vae"
    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int

    @property
    def plain(self) -> VAEConfig:
        """The settings of the same VAE without the statistics of its latents."""
        return VAEConfig(
            self.in_channels, self.out_channels, self.latent_channels, self.block_out_channels, self.layers_per_block
        )

    @property
    def channels(self) -> int:
        """Channels of the latents that the denoiser sees."""
        return self.latent_channels * PATCH**2

    @property
    def label(self) -> str:
        return self.plain.label

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        return self.plain.working_bytes(pixels, itemsize, quadratic)

    def rows(self) -> Iterator[TensorRow]:
        for one in vae.tensors(self.plain):
            name, _, kind = one.name.rpartition(".")
            inner = (TensorSource(f"{_INNER[name]}.{kind}"),) if name in _INNER else ()
            yield TensorRow(one.name, one.shape, (*one.sources, *inner))
        for name in _STATISTICS:
            yield row(name, (self.channels,))


FLUX2_VAE = Flux2VAEConfig(3, 3, 32, (128, 256, 512, 512), 2)

FLUX2_LATENTS = Latents(
    channels=FLUX2_VAE.channels,
    vae_scale_factor=VAE_SCALE_FACTOR * PATCH,
    multiple=VAE_SCALE_FACTOR * PATCH,
    scaling_factor=1.0,
    latent_rgb_factors=preview_colours.FLUX2,
    suspicious_above=SUSPICIOUS_ABOVE_IF_NORMALISED,
    patch=PATCH,
)
"""The latents that the denoiser sees. The VAE's own statistics scale them, so there is no common factor.

diffusers' pipelines keep them in the denoiser's dtype between the steps.
"""


def infer(shapes: Shapes) -> Flux2VAEConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    found = vae.infer(shapes)
    return Flux2VAEConfig(
        found.in_channels,
        found.out_channels,
        found.latent_channels,
        found.block_out_channels,
        found.layers_per_block,
    )


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the VAE may be left over, None if it may not. ``name``: without prefix."""
    return "a count from training" if name == "bn.num_batches_tracked" else None
