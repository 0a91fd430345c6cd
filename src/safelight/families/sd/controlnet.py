"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): a copy of a UNet's encoder that gets a picture as input. Infers
their settings from a file's shapes, and their tensors from the settings.

Names are those of ``diffusers.ControlNetModel`` and of the original code (``cldm``, here "LDM").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from safelight.families.components import Config
from safelight.families.sd import unet
from safelight.families.sd.unet import UNetConfig
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias


@dataclass(frozen=True, slots=True)
class ControlNetConfig(Config):
    """Settings of a ControlNet.

    ``encoder``: settings of the UNet whose encoder it copies; only those of the encoder count.
    ``hint``: widths of the convolutions that scale the picture down to the latents' size: diffusers'
    ``conditioning_embedding_out_channels``.
    ``hint_channels``: channels of the picture: diffusers' ``conditioning_channels``.
    """

    architecture: ClassVar[str] = "controlnet"
    encoder: UNetConfig
    hint: tuple[int, ...]
    hint_channels: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ControlNetConfig:
        return cls(UNetConfig.from_json(values["encoder"]), tuple(values["hint"]), values["hint_channels"])

    def rows(self) -> Iterator[TensorRow]:
        return tensors(self)

    @property
    def label(self) -> str:
        return self.encoder.label

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        return self.encoder.working_bytes(pixels, itemsize, quadratic)


def infer(shapes: Shapes) -> ControlNetConfig:
    """Infer a ControlNet's settings from its tensors' shapes, in diffusers' names or LDM's.

    Raises NotThisArchitecture.
    """
    try:
        if "controlnet_cond_embedding.conv_in.weight" in shapes:
            first = shapes["controlnet_cond_embedding.conv_in.weight"]
            count = count_indexed(shapes, "controlnet_cond_embedding.blocks.")
            names = [f"controlnet_cond_embedding.blocks.{number}.weight" for number in range(1, count, 2)]
        else:
            first = shapes["input_hint_block.0.weight"]
            names = [f"input_hint_block.{number}.weight" for number in range(4, 14, 4)]
        hint = (first[0], *(shapes[name][0] for name in names))
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the ControlNet has no tensor {error}") from error
    return ControlNetConfig(unet.infer(shapes, down_and_mid_only=True), hint, first[1])


def tensors(config: ControlNetConfig) -> Iterator[TensorRow]:
    """Yield every tensor of the ControlNet, in the order of use."""
    encoder, hint = config.encoder, config.hint
    yield from unet.embedding(encoder)
    yield from weight_and_bias(
        "controlnet_cond_embedding.conv_in", (hint[0], config.hint_channels, 3, 3), "input_hint_block.0"
    )
    for number, (before, width) in enumerate(pairwise(hint)):
        for inner, (rows, columns) in enumerate(((before, before), (width, before))):
            ours, theirs = 2 * number + inner, 2 * (2 * number + inner + 1)
            name = f"controlnet_cond_embedding.blocks.{ours}"
            yield from weight_and_bias(name, (rows, columns, 3, 3), f"input_hint_block.{theirs}")
    last = f"input_hint_block.{4 * len(hint) - 2}"
    widths = (encoder.block_out_channels[0], hint[-1], 3, 3)
    yield from weight_and_bias("controlnet_cond_embedding.conv_out", widths, last)
    yield from unet.down_and_mid_blocks(encoder)
    for number, width in enumerate(unet.skips(encoder)):
        name = f"controlnet_down_blocks.{number}"
        yield row(f"{name}.weight", (width, width, 1, 1), f"zero_convs.{number}.0.weight")
        yield row(f"{name}.bias", (width,), f"zero_convs.{number}.0.bias")
    width = encoder.block_out_channels[-1]
    yield from weight_and_bias("controlnet_mid_block", (width, width, 1, 1), "middle_block_out.0")
