"""FLUX.1's ControlNets: some of the transformer's blocks, whose outputs are added to those of the transformer.

Names are those of ``diffusers.FluxControlNetModel`` and of XLabs' original code. InstantX's and Shakker Labs' read the
latents of a picture, XLabs' the pixels. A union (InstantX, Shakker Labs) also reads which type the picture is of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safelight.families.components import Config
from safelight.families.flux import transformer
from safelight.families.flux.transformer import FluxConfig
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, row, weight_and_bias

UNION_TYPES = ("canny", "tile", "depth", "blur", "pose", "gray", "low_quality")
"""The types of pictures of the published unions, in the order of their numbers (diffusers' ``control_mode``)."""

HINT_WIDTH = 16
"""Width of the convolutions that scale a picture down, and number of their outputs (``input_hint_block``)."""

HINT_STEPS = 6
"""Convolutions between the first and the last of them; every second one halves the sides."""


@dataclass(frozen=True, slots=True)
class FluxControlNetConfig(Config):
    """Settings of a ControlNet.

    ``net``: settings of the transformer with as many blocks; ``guidance`` says whether the ControlNet reads the scale.
    ``modes``: diffusers' ``num_mode``: how many types of pictures a union knows; 0 for another ControlNet.
    ``pixels``: it reads pixels through convolutions, not latents.
    """

    architecture: ClassVar[str] = "flux-controlnet"
    net: FluxConfig
    modes: int
    pixels: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FluxControlNetConfig:
        return cls(FluxConfig.from_json(values["net"]), values["modes"], values["pixels"])

    @property
    def label(self) -> str:
        return self.net.label

    @property
    def reads_latents(self) -> bool:
        return not self.pixels

    @property
    def union_types(self) -> tuple[str, ...]:
        return UNION_TYPES[: self.modes]

    @property
    def patch(self) -> int:
        """How many outputs of the convolutions in each direction are one token: diffusers' ``patch_size``."""
        return math.isqrt(self.net.inputs // HINT_WIDTH) if self.pixels else 1

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        outputs = (self.net.layers + self.net.single_layers) * (pixels // 256) * self.net.width * itemsize
        return self.net.working_bytes(pixels, itemsize, quadratic) + outputs

    def rows(self) -> Iterator[TensorRow]:
        net, wide = self.net, self.net.width
        if self.pixels:
            yield from _hint_convolution("conv_in", 0, 3)
            for n in range(HINT_STEPS):
                yield from _hint_convolution(f"blocks.{n}", n + 1, HINT_WIDTH)
            yield from _hint_convolution("conv_out", HINT_STEPS + 1, HINT_WIDTH)
        yield from weight_and_bias("controlnet_x_embedder", (wide, net.inputs), "pos_embed_input")
        if self.modes:
            yield row("controlnet_mode_embedder.weight", (self.modes, wide))
        yield from net.rows_before_last()
        for name, count in (("controlnet_blocks", net.layers), ("controlnet_single_blocks", net.single_layers)):
            for n in range(count):
                yield from weight_and_bias(f"{name}.{n}", (wide, wide))


def _hint_convolution(name: str, number: int, inputs: int) -> Iterator[TensorRow]:
    """Yield a convolution. ``number``: its place; the original counts the activations between them too."""
    other = f"input_hint_block.{2 * number}"
    yield from weight_and_bias(f"input_hint_block.{name}", (HINT_WIDTH, inputs, 3, 3), other)


def infer(shapes: Shapes) -> FluxControlNetConfig:
    """Infer the settings from shapes, in diffusers' names or XLabs'. Raises NotThisArchitecture."""
    if "controlnet_blocks.0.weight" not in shapes:
        raise NotThisArchitecture("the ControlNet has no tensor controlnet_blocks.0.weight")
    modes = shapes.get("controlnet_mode_embedder.weight", (0,))[0]
    pixels = any(name.startswith("input_hint_block.") for name in shapes)
    return FluxControlNetConfig(transformer.infer(shapes, has_last=False), modes, pixels)


def find_mismatch(control: Config, denoiser: Config) -> str | None:
    """Return why a ControlNet does not fit a transformer, None if it does."""
    if not isinstance(control, FluxControlNetConfig) or not isinstance(denoiser, FluxConfig):
        return "is a ControlNet of another architecture than {model}"
    net = control.net
    for what, its, ours in (
        ("reads tokens of width", net.inputs, denoiser.inputs),
        ("has blocks of width", net.width, denoiser.width),
        ("has heads of width", net.head_size, denoiser.head_size),
        ("reads text of width", net.text_width, denoiser.text_width),
        ("reads a pooled output of width", net.pooled_width, denoiser.pooled_width),
    ):
        if its != ours:
            return f"{what} {its}, but {ours} in {{model}}"
    return None
