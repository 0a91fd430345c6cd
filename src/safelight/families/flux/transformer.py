"""The table of FLUX.1's transformer. Names are those of ``diffusers.FluxTransformer2DModel`` and of the original.

The original fuses projections: the three of an attention into ``qkv``, and in single blocks also that of the
feed-forward layer into ``linear1``. Its last layer has the shift before the scale; diffusers has them the other way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.parts.flux_blocks import STREAMS, double_block, single_block, working_bytes
from safelight.families.parts.tokens import PATCH
from safelight.families.tables import (
    NotThisArchitecture,
    Shapes,
    TensorRow,
    TensorSource,
    count_indexed,
    row,
    weight_and_bias,
)

TIME_WIDTH = 256
"""Width of the sines and cosines of the timestep, and of those of the guidance scale."""


@dataclass(frozen=True, slots=True)
class FluxConfig(Config):
    """Settings of a FLUX.1 transformer.

    ``inputs``: values per token that it reads: ``PATCH`` times ``PATCH`` latents, in some models more.
    ``channels``: of the latents that it predicts.
    ``layers``: double blocks, which have weights of their own for the text.
    ``single_layers``: blocks after them, which have the same weights for image and text.
    ``head_size``: width of an attention head.
    ``text_width``: width of the second text encoder's hidden states.
    ``pooled_width``: width of the first text encoder's pooled output.
    ``guidance``: it reads the scale of distilled guidance.
    """

    architecture: ClassVar[str] = "flux"
    inputs: int
    channels: int
    width: int
    layers: int
    single_layers: int
    head_size: int
    text_width: int
    pooled_width: int
    guidance: bool

    @property
    def label(self) -> str:
        return f"{self.inputs}-{self.width}x{self.layers}+{self.single_layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        return working_bytes(pixels, self.width, self.head_size, itemsize, quadratic)

    def rows(self) -> Iterator[TensorRow]:
        yield from self.rows_before_last()
        last, wide = "final_layer.adaLN_modulation.1", self.width
        for kind, shape in (("weight", (2 * wide, wide)), ("bias", (2 * wide,))):
            yield row(f"norm_out.linear.{kind}", shape, TensorSource(f"{last}.{kind}", swap_halves=True))
        yield from weight_and_bias("proj_out", (self.channels * PATCH**2, wide), "final_layer.linear")

    def rows_before_last(self) -> Iterator[TensorRow]:
        """Return the table without the last layer, which ControlNets do not have."""
        wide = self.width
        yield from weight_and_bias("x_embedder", (wide, self.inputs), "img_in")
        embedders = [("timestep_embedder", "time_in", TIME_WIDTH), ("text_embedder", "vector_in", self.pooled_width)]
        if self.guidance:
            embedders.insert(1, ("guidance_embedder", "guidance_in", TIME_WIDTH))
        for name, other, inputs in embedders:
            yield from weight_and_bias(f"time_text_embed.{name}.linear_1", (wide, inputs), f"{other}.in_layer")
            yield from weight_and_bias(f"time_text_embed.{name}.linear_2", (wide, wide), f"{other}.out_layer")
        yield from weight_and_bias("context_embedder", (wide, self.text_width), "txt_in")
        for n in range(self.layers):
            yield from self._double_block(f"transformer_blocks.{n}", f"double_blocks.{n}")
        for n in range(self.single_layers):
            yield from self._single_block(f"single_transformer_blocks.{n}", f"single_blocks.{n}")

    def _double_block(self, name: str, other: str) -> Iterator[TensorRow]:
        wide = self.width
        for end, stream, *_ in STREAMS:
            yield from weight_and_bias(f"{name}.norm1{end}.linear", (6 * wide, wide), f"{other}.{stream}_mod.lin")
        yield from double_block(name, other, wide, self.head_size)

    def _single_block(self, name: str, other: str) -> Iterator[TensorRow]:
        wide = self.width
        yield from weight_and_bias(f"{name}.norm.linear", (3 * wide, wide), f"{other}.modulation.lin")
        yield from single_block(name, other, wide, self.head_size)


_XLABS = re.compile(
    r"(?P<single>single_)?transformer_blocks\.(?P<number>[0-9]+)\."
    r"(attn\.(?P<part>to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)|(?P<last>proj_out))"
    r"\.(?P<leaf>weight|bias)"
)


def xlabs_sources(name: str) -> Iterator[TensorSource]:
    """Yield the name of a tensor in XLabs' adapters, which fuse the three projections of an attention.

    ``name``: in the module.
    """
    found = _XLABS.fullmatch(name)
    if found is None:
        return
    processor = f"{'single' if found['single'] else 'double'}_blocks.{found['number']}.processor"
    for stream, *parts in ((1, *STREAMS[0][2:]), (2, *STREAMS[1][2:])):
        *projections, _ = parts
        end = "" if found["single"] else str(stream)
        if found["part"] in projections:
            yield TensorSource(f"{processor}.qkv_lora{end}.{found['leaf']}", (projections.index(found["part"]), 3))
        elif found["part"] in parts or (found["last"] and found["single"] and stream == 1):
            yield TensorSource(f"{processor}.proj_lora{end}.{found['leaf']}")


def infer(shapes: Shapes, has_last: bool = True) -> FluxConfig:
    """Infer the settings from shapes, in diffusers' names or the original's. Raises NotThisArchitecture.

    ``has_last``: whether there is a last layer, whose outputs are then counted; a ControlNet has none.
    """

    def of(name: str, other: str) -> tuple[int, ...]:
        return shapes[name] if name in shapes else shapes[other]

    try:
        # No unpacking: a wrong number of axes is better named as a wrong shape.
        embedder = of("x_embedder.weight", "img_in.weight")
        norm = of("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.norm.query_norm.scale")
        pooled = of("time_text_embed.text_embedder.linear_1.weight", "vector_in.in_layer.weight")
        guidance = "time_text_embed.guidance_embedder.", "guidance_in."
        return FluxConfig(
            embedder[-1],
            (of("proj_out.weight", "final_layer.linear.weight")[0] if has_last else embedder[-1]) // PATCH**2,
            embedder[0],
            count_indexed(shapes, "transformer_blocks.") or count_indexed(shapes, "double_blocks."),
            count_indexed(shapes, "single_transformer_blocks.") or count_indexed(shapes, "single_blocks."),
            norm[0],
            of("context_embedder.weight", "txt_in.weight")[-1],
            pooled[-1],
            any(name.startswith(guidance) for name in shapes),
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error
