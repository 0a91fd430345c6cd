"""Qwen-Image's VAE (``diffusers.AutoencoderKLQwenImage``): the table of its tensors, and the form of its latents.

It is Wan's VAE for videos with other weights; a picture is a video of one frame. Names are those of diffusers and of
Wan. Convolutions over frames (``time_conv``) are used from the second frame on, so they are not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.family import SUSPICIOUS_ABOVE_IF_NORMALISED, Latents
from safelight.families.parts import preview_colours
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, row, weight_and_bias

PATTERN = r"encoder\.(downsamples\.0\.residual\.2|down_blocks\.0\.conv1)\."
"""Matches a tensor that this VAE has, in Wan's names or diffusers', and an ``AutoencoderKL`` does not."""

LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)  # fmt: skip
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)  # fmt: skip
"""Mean and standard deviation of each channel, as published. The denoiser sees latents that are normalised by them."""

LIVE_TENSORS = 24
"""Tensors as large as the VAE's last feature map that live at once: it keeps the input of each convolution over frames
for a next frame, which a picture does not have."""


@dataclass(frozen=True, slots=True)
class QwenVAEConfig(Config):
    """Settings of Qwen-Image's VAE.

    ``width``: channels of the first level.
    ``multipliers``: the channels of each level by those of the first.
    ``layers_per_block``: residual blocks of a level in the encoder; the decoder has one more.
    """

    architecture: ClassVar[str] = "qwen-vae"
    in_channels: int
    latent_channels: int
    width: int
    multipliers: tuple[int, ...]
    layers_per_block: int

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(self.width * one for one in self.multipliers)

    @property
    def label(self) -> str:
        return f"{'-'.join(map(str, self.widths))}x{self.layers_per_block}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        del quadratic
        scores = (pixels // 64) ** 2 * itemsize
        return LIVE_TENSORS * pixels * self.width * itemsize + scores

    def rows(self) -> Iterator[TensorRow]:
        widths, latent = self.widths, self.latent_channels
        yield from weight_and_bias("encoder.conv_in", (widths[0], self.in_channels, 3, 3, 3), "encoder.conv1")
        yield from self._encoder_levels()
        yield from _middle("encoder", widths[-1])
        yield from _head("encoder", widths[-1], 2 * latent)
        yield from weight_and_bias("quant_conv", (2 * latent, 2 * latent, 1, 1, 1), "conv1")
        yield from weight_and_bias("post_quant_conv", (latent, latent, 1, 1, 1), "conv2")
        yield from weight_and_bias("decoder.conv_in", (widths[-1], latent, 3, 3, 3), "decoder.conv1")
        yield from _middle("decoder", widths[-1])
        yield from self._decoder_levels()
        yield from _head("decoder", widths[0], self.in_channels)

    def _encoder_levels(self) -> Iterator[TensorRow]:
        number, before = 0, self.width
        for level, width in enumerate(self.widths):
            for _ in range(self.layers_per_block):
                yield from _resnet(f"encoder.down_blocks.{number}", f"encoder.downsamples.{number}", before, width)
                number, before = number + 1, width
            if level < len(self.widths) - 1:
                ours, theirs = f"encoder.down_blocks.{number}.resample.1", f"encoder.downsamples.{number}.resample.1"
                yield from weight_and_bias(ours, (width, width, 3, 3), theirs)
                number += 1

    def _decoder_levels(self) -> Iterator[TensorRow]:
        number, before = 0, self.widths[-1]
        for level, width in enumerate(reversed(self.widths)):
            for layer in range(self.layers_per_block + 1):
                ours, theirs = f"decoder.up_blocks.{level}.resnets.{layer}", f"decoder.upsamples.{number}"
                yield from _resnet(ours, theirs, before, width)
                number, before = number + 1, width
            if level < len(self.widths) - 1:
                before = width // 2
                ours = f"decoder.up_blocks.{level}.upsamplers.0.resample.1"
                yield from weight_and_bias(ours, (before, width, 3, 3), f"decoder.upsamples.{number}.resample.1")
                number += 1


def _resnet(ours: str, theirs: str, before: int, width: int) -> Iterator[TensorRow]:
    yield row(f"{ours}.norm1.gamma", (before, 1, 1, 1), f"{theirs}.residual.0.gamma")
    yield from weight_and_bias(f"{ours}.conv1", (width, before, 3, 3, 3), f"{theirs}.residual.2")
    yield row(f"{ours}.norm2.gamma", (width, 1, 1, 1), f"{theirs}.residual.3.gamma")
    yield from weight_and_bias(f"{ours}.conv2", (width, width, 3, 3, 3), f"{theirs}.residual.6")
    if before != width:
        yield from weight_and_bias(f"{ours}.conv_shortcut", (width, before, 1, 1, 1), f"{theirs}.shortcut")


def _middle(half: str, width: int) -> Iterator[TensorRow]:
    yield from _resnet(f"{half}.mid_block.resnets.0", f"{half}.middle.0", width, width)
    ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.middle.1"
    yield row(f"{ours}.norm.gamma", (width, 1, 1), f"{theirs}.norm.gamma")
    yield from weight_and_bias(f"{ours}.to_qkv", (3 * width, width, 1, 1), f"{theirs}.to_qkv")
    yield from weight_and_bias(f"{ours}.proj", (width, width, 1, 1), f"{theirs}.proj")
    yield from _resnet(f"{half}.mid_block.resnets.1", f"{half}.middle.2", width, width)


def _head(half: str, width: int, out: int) -> Iterator[TensorRow]:
    yield row(f"{half}.norm_out.gamma", (width, 1, 1, 1), f"{half}.head.0.gamma")
    yield from weight_and_bias(f"{half}.conv_out", (out, width, 3, 3, 3), f"{half}.head.2")


def _find_width(shapes: Shapes, module: str) -> int | None:
    """Return how many channels a convolution makes, None if there is neither its weight nor its bias."""
    found = shapes.get(f"{module}.weight") or shapes.get(f"{module}.bias")
    return found[0] if found else None


def infer(shapes: Shapes) -> QwenVAEConfig:
    """Infer the settings from shapes, in diffusers' names or Wan's. Raises NotThisArchitecture."""
    wan = "encoder.conv1.weight" in shapes
    block = "encoder.downsamples.{}" if wan else "encoder.down_blocks.{}"
    convolution, resample = f"{block}.{'residual.2' if wan else 'conv1'}", f"{block}.resample.1"
    widths: list[int] = []
    layers, number = 0, 0
    for number in range(len(shapes)):
        # Either of the two tensors shows what the block is, so that the other can be missing and is named.
        if (width := _find_width(shapes, convolution.format(number))) is not None:
            widths.append(width)
        elif _find_width(shapes, resample.format(number)) is not None:
            layers = layers or number
        else:
            break
    if not widths:
        raise NotThisArchitecture(f"the VAE has no tensor {convolution.format(0)}.weight")
    try:
        first = shapes["encoder.conv1.weight" if wan else "encoder.conv_in.weight"]
        return QwenVAEConfig(
            in_channels=first[1],
            latent_channels=shapes["decoder.conv1.weight" if wan else "decoder.conv_in.weight"][1],
            width=first[0],
            multipliers=tuple(one // first[0] for one in widths[:: layers or len(widths)]),
            layers_per_block=layers or len(widths),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise NotThisArchitecture(f"the VAE has no tensor {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the VAE may be left over, None if it may not. ``name``: without prefix."""
    return "for the second frame of a video and those after it" if ".time_conv." in name else None


QWEN_VAE = QwenVAEConfig(3, 16, 96, (1, 2, 4, 4), 2)

QWEN_LATENTS = Latents(
    channels=16,
    vae_scale_factor=8,
    multiple=16,
    scaling_factor=1.0,
    suspicious_above=SUSPICIOUS_ABOVE_IF_NORMALISED,
    latent_rgb_factors=preview_colours.QWEN,
)
"""The latents that the denoiser sees. The mean and the deviation of each channel scale them, not a common factor.

Each token of the transformer has two by two latents, so sides are multiples of 16 pixels.
"""
