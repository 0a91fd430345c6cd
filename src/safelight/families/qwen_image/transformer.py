"""The table of Qwen-Image's transformer. The original has the names of ``diffusers.QwenImageTransformer2DModel``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.parts.tokens import PATCH
from safelight.families.tables import (
    NotThisArchitecture,
    Shapes,
    TensorRow,
    count_indexed,
    row,
    weight_and_bias,
)

TIME_WIDTH = 256
"""Width of the sines and cosines of the timestep."""

TEXT_TOKENS = 512

ZERO_MARKER = "__index_timestep_zero__"
"""A tensor without meaning of its own: ComfyUI's files of Qwen-Image-Edit 2511 have it."""

_LAYERED = "time_text_embed.addition_t_embedding.weight"

_NUMBERED = re.compile(r"transformer_blocks\.([0-9]+)\.")


@dataclass(frozen=True, slots=True)
class QwenImageConfig(Config):
    """Settings of a Qwen-Image transformer.

    ``inputs``: values per token that it reads.
    ``channels``: of the latents that it predicts.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text encoder's hidden states.
    ``zero_reference_time``: reference images are modulated as at timestep 0 (diffusers' ``zero_cond_t``).
    """

    architecture: ClassVar[str] = "qwen-image"
    inputs: int
    channels: int
    width: int
    layers: int
    head_size: int
    text_width: int
    zero_reference_time: bool = False

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        tokens = pixels // 256 + TEXT_TOKENS
        scores = self.width // self.head_size * tokens**2 * itemsize if quadratic else 0
        # Rotary embeddings compute in fp32.
        return tokens * 16 * self.width * itemsize + 4 * tokens * self.width * 4 + scores

    def rows(self) -> Iterator[TensorRow]:
        yield from self.rows_before_last()
        wide = self.width
        yield from weight_and_bias("norm_out.linear", (2 * wide, wide))
        yield from weight_and_bias("proj_out", (self.channels * PATCH**2, wide))

    def rows_before_last(self) -> Iterator[TensorRow]:
        """Return the table without the last layer, which ControlNets do not have."""
        wide = self.width
        yield from weight_and_bias("img_in", (wide, self.inputs))
        yield row("txt_norm.weight", (self.text_width,))
        yield from weight_and_bias("txt_in", (wide, self.text_width))
        time = "time_text_embed.timestep_embedder"
        yield from weight_and_bias(f"{time}.linear_1", (wide, TIME_WIDTH))
        yield from weight_and_bias(f"{time}.linear_2", (wide, wide))
        for n in range(self.layers):
            yield from self._block(f"transformer_blocks.{n}")

    def _block(self, name: str) -> Iterator[TensorRow]:
        wide, attention = self.width, f"{name}.attn"
        for stream in ("img", "txt"):
            yield from weight_and_bias(f"{name}.{stream}_mod.1", (6 * wide, wide))
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            yield from weight_and_bias(f"{attention}.{part}", (wide, wide))
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield row(f"{attention}.{norm}.weight", (self.head_size,))
        for part in ("to_out.0", "to_add_out"):
            yield from weight_and_bias(f"{attention}.{part}", (wide, wide))
        for stream in ("img", "txt"):
            yield from weight_and_bias(f"{name}.{stream}_mlp.net.0.proj", (4 * wide, wide))
            yield from weight_and_bias(f"{name}.{stream}_mlp.net.2", (wide, 4 * wide))


def infer(shapes: Shapes, has_last: bool = True) -> QwenImageConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture.

    ``has_last``: whether there is a last layer, whose outputs are then counted; a ControlNet has none.
    """
    if _LAYERED in shapes:
        raise NotThisArchitecture(f"the transformer has {_LAYERED}, as Qwen-Image Layered")
    try:
        # The modulations within the blocks and this norm tell it from FLUX.1.
        text_width = shapes["txt_norm.weight"][0]
        return QwenImageConfig(
            shapes["img_in.weight"][-1],
            (shapes["proj_out.weight"][0] if has_last else shapes["img_in.weight"][-1]) // PATCH**2,
            shapes["img_in.weight"][0],
            count_indexed(shapes, "transformer_blocks."),
            shapes["transformer_blocks.0.attn.norm_q.weight"][0],
            text_width,
            ZERO_MARKER in shapes,
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``D00`` and so on, else ``BASE``."""
    for name in names:
        found = _NUMBERED.match(name)
        if found is not None:
            return f"D{int(found[1]):02d}"
    return "BASE"
