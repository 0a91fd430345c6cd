"""The table of Chroma's transformer. Names are those of ``diffusers.ChromaTransformer2DModel`` and of the original.

It has the blocks of FLUX.1 without their modulation. A small network, ``distilled_guidance_layer``, computes the
modulation of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.parts.flux_blocks import double_block, single_block, working_bytes
from safelight.families.parts.tokens import PATCH
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias

GUIDANCE = "distilled_guidance_layer"
"""The network that computes the modulation."""


@dataclass(frozen=True, slots=True)
class ChromaConfig(Config):
    """Settings of a Chroma transformer.

    ``inputs``: values per token that it reads: ``PATCH`` times ``PATCH`` latents.
    ``channels``: of the latents that it predicts.
    ``layers``: double blocks, which have weights of their own for the text.
    ``single_layers``: blocks after them, which have the same weights for image and text.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text encoder's hidden states.
    ``guidance_inputs``, ``guidance_width``, ``guidance_layers``: of the network that computes the modulation.
    """

    architecture: ClassVar[str] = "chroma"
    inputs: int
    channels: int
    width: int
    layers: int
    single_layers: int
    head_size: int
    text_width: int
    guidance_inputs: int
    guidance_width: int
    guidance_layers: int

    @property
    def label(self) -> str:
        return f"{self.inputs}-{self.width}x{self.layers}+{self.single_layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        return working_bytes(pixels, self.width, self.head_size, itemsize, quadratic)

    def rows(self) -> Iterator[TensorRow]:
        wide, inner = self.width, self.guidance_width
        yield from weight_and_bias("x_embedder", (wide, self.inputs), "img_in")
        yield from weight_and_bias(f"{GUIDANCE}.in_proj", (inner, self.guidance_inputs))
        for n in range(self.guidance_layers):
            layer = f"{GUIDANCE}.layers.{n}"
            yield row(f"{GUIDANCE}.norms.{n}.weight", (inner,), f"{GUIDANCE}.norms.{n}.scale")
            yield from weight_and_bias(f"{layer}.linear_1", (inner, inner), f"{layer}.in_layer")
            yield from weight_and_bias(f"{layer}.linear_2", (inner, inner), f"{layer}.out_layer")
        yield from weight_and_bias(f"{GUIDANCE}.out_proj", (wide, inner))
        yield from weight_and_bias("context_embedder", (wide, self.text_width), "txt_in")
        for n in range(self.layers):
            yield from double_block(f"transformer_blocks.{n}", f"double_blocks.{n}", wide, self.head_size)
        for n in range(self.single_layers):
            yield from single_block(f"single_transformer_blocks.{n}", f"single_blocks.{n}", wide, self.head_size)
        yield from weight_and_bias("proj_out", (self.channels * PATCH**2, wide), "final_layer.linear")


def infer(shapes: Shapes) -> ChromaConfig:
    """Infer the settings from shapes, in diffusers' names or the original's. Raises NotThisArchitecture."""

    def of(name: str, other: str) -> tuple[int, ...]:
        return shapes[name] if name in shapes else shapes[other]

    try:
        # No unpacking: a wrong number of axes is better named as a wrong shape.
        guidance = shapes[f"{GUIDANCE}.in_proj.weight"]
        embedder = of("x_embedder.weight", "img_in.weight")
        norm = of("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.norm.query_norm.scale")
        return ChromaConfig(
            embedder[-1],
            of("proj_out.weight", "final_layer.linear.weight")[0] // PATCH**2,
            embedder[0],
            count_indexed(shapes, "transformer_blocks.") or count_indexed(shapes, "double_blocks."),
            count_indexed(shapes, "single_transformer_blocks.") or count_indexed(shapes, "single_blocks."),
            norm[0],
            of("context_embedder.weight", "txt_in.weight")[-1],
            guidance[-1],
            guidance[0],
            count_indexed(shapes, f"{GUIDANCE}.layers."),
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error
