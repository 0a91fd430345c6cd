"""diffusers' ``AutoencoderKL``, the VAE of most families. Infers its settings from a file's shapes, and its tensors
from the settings.

Names are those of ``diffusers.AutoencoderKL`` (also those before diffusers 0.14) and of LDM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias


@dataclass(frozen=True, slots=True)
class VAEConfig(Config):
    """Settings of a VAE.

    ``quantised``: it has the two 1×1 convolutions around the latents that Stable Diffusion's VAE has (``quant_conv``).
    """

    architecture: ClassVar[str] = "vae"
    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    quantised: bool = True

    def rows(self) -> Iterator[TensorRow]:
        return tensors(self)

    @property
    def label(self) -> str:
        return f"{'-'.join(map(str, self.block_out_channels))}x{self.layers_per_block}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        del quadratic
        scores = (pixels // 64) ** 2 * itemsize
        return LIVE_TENSORS * pixels * self.block_out_channels[0] * itemsize + scores


NORM_GROUPS = 32
"""Groups of the VAE's normalisations: its widths are multiples of this."""

LIVE_TENSORS = 8
"""Tensors as large as the VAE's last feature map that live at once while it decodes."""


def infer(shapes: Shapes) -> VAEConfig:
    """Infer a VAE's settings from its tensors' shapes, in diffusers' names or LDM's. Raises NotThisArchitecture."""
    block = (
        "encoder.down_blocks.{}.resnets.{}"
        if any(name.startswith("encoder.down_blocks.") for name in shapes)
        else "encoder.down.{}.block.{}"
    )
    try:
        levels = count_indexed(shapes, block.split("{}", maxsplit=1)[0])
        layers = count_indexed(shapes, block.format(0, ""))
        if not levels or not layers:
            raise KeyError(f"{block.format(0, 0)}.norm1.weight")
        config = VAEConfig(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(shapes[f"{block.format(i, 0)}.conv1.weight"][0] for i in range(levels)),
            layers_per_block=layers,
            quantised="quant_conv.weight" in shapes or "post_quant_conv.weight" in shapes,
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the VAE has no tensor {error}") from error
    return config


def tensors(config: VAEConfig) -> Iterator[TensorRow]:
    """Yield every tensor of the VAE in the order of use: encoder, quantisation convolutions, decoder."""
    widths, layers, latent = config.block_out_channels, config.layers_per_block, config.latent_channels
    first, last = widths[0], widths[-1]

    yield from weight_and_bias("encoder.conv_in", (first, config.in_channels, 3, 3))
    before = first
    for level, width in enumerate(widths):
        for layer in range(layers):
            ours, theirs = f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}"
            yield from _resnet(ours, theirs, before, width)
            before = width
        if level < len(widths) - 1:
            ours = f"encoder.down_blocks.{level}.downsamplers.0.conv"
            yield from weight_and_bias(ours, (width, width, 3, 3), f"encoder.down.{level}.downsample.conv")
    yield from _middle("encoder", last)
    yield from weight_and_bias("encoder.conv_norm_out", (last,), "encoder.norm_out")
    yield from weight_and_bias("encoder.conv_out", (latent * 2, last, 3, 3))
    if config.quantised:
        yield from weight_and_bias("quant_conv", (latent * 2, latent * 2, 1, 1))
        yield from weight_and_bias("post_quant_conv", (latent, latent, 1, 1))
    yield from weight_and_bias("decoder.conv_in", (last, latent, 3, 3))
    yield from _middle("decoder", last)
    before = last
    for level, width in enumerate(reversed(widths)):
        mirrored = len(widths) - 1 - level
        for layer in range(layers + 1):
            ours, theirs = f"decoder.up_blocks.{level}.resnets.{layer}", f"decoder.up.{mirrored}.block.{layer}"
            yield from _resnet(ours, theirs, before, width)
            before = width
        if level < len(widths) - 1:
            ours = f"decoder.up_blocks.{level}.upsamplers.0.conv"
            yield from weight_and_bias(ours, (width, width, 3, 3), f"decoder.up.{mirrored}.upsample.conv")
    yield from weight_and_bias("decoder.conv_norm_out", (first,), "decoder.norm_out")
    yield from weight_and_bias("decoder.conv_out", (config.out_channels, first, 3, 3))


def _resnet(ours: str, theirs: str, before: int, width: int) -> Iterator[TensorRow]:
    yield from weight_and_bias(f"{ours}.norm1", (before,), f"{theirs}.norm1")
    yield from weight_and_bias(f"{ours}.conv1", (width, before, 3, 3), f"{theirs}.conv1")
    yield from weight_and_bias(f"{ours}.norm2", (width,), f"{theirs}.norm2")
    yield from weight_and_bias(f"{ours}.conv2", (width, width, 3, 3), f"{theirs}.conv2")
    if before != width:
        yield from weight_and_bias(f"{ours}.conv_shortcut", (width, before, 1, 1), f"{theirs}.nin_shortcut")


def _middle(half: str, width: int) -> Iterator[TensorRow]:
    ours, theirs = f"{half}.mid_block", f"{half}.mid"
    yield from _resnet(f"{ours}.resnets.0", f"{theirs}.block_1", width, width)
    attention, other = f"{ours}.attentions.0", f"{theirs}.attn_1"
    yield from weight_and_bias(f"{attention}.group_norm", (width,), f"{other}.norm")
    for name, ldm, old in (
        ("to_q", "q", "query"),
        ("to_k", "k", "key"),
        ("to_v", "v", "value"),
        ("to_out.0", "proj_out", "proj_attn"),
    ):
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            yield row(f"{attention}.{name}.{kind}", shape, f"{other}.{ldm}.{kind}", f"{attention}.{old}.{kind}")
    yield from _resnet(f"{ours}.resnets.1", f"{theirs}.block_2", width, width)
