"""The table of Anima's transformer, which is that of Cosmos-Predict2 (NVIDIA 2025).

Names are those of ``diffusers.CosmosTransformer3DModel`` and of the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.parts.tokens import PATCH
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row

MASK_CHANNELS = 1
"""Channels of its input besides the latents: a mask of padding, which is zero for a whole image."""

_NUMBERED = re.compile(r"(transformer_blocks|blocks)\.([0-9]+)\.")

_UNREAD = re.compile(
    r"pos_embedder\.(seq|dim_(spatial|temporal)_range)$"
    r"|accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours)$"
    r"|.*_extra_state$"
)


@dataclass(frozen=True, slots=True)
class AnimaConfig(Config):
    """Settings of an Anima transformer.

    ``hidden``: width of the feed-forward layers.
    ``head_size``: width of an attention head.
    ``text_width``: width of the text conditioner's hidden states.
    ``modulation``: width of the hidden layers that compute the modulations.
    """

    architecture: ClassVar[str] = "anima"
    channels: int
    width: int
    layers: int
    hidden: int
    head_size: int
    text_width: int
    modulation: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        # A call has one row. The rotary embedding computes in fp32.
        tokens = pixels // 256
        scores = self.width // self.head_size * tokens**2 * itemsize if quadratic else 0
        return tokens * (8 * self.width + 2 * self.hidden) * itemsize + 4 * tokens * self.width * 4 + scores

    def rows(self) -> Iterator[TensorRow]:
        wide, area = self.width, PATCH**2
        patch = area * (self.channels + MASK_CHANNELS)
        yield _renamed("patch_embed.proj", (wide, patch), "x_embedder.proj.1")
        yield _renamed("time_embed.t_embedder.linear_1", (wide, wide), "t_embedder.1.linear_1")
        yield _renamed("time_embed.t_embedder.linear_2", (3 * wide, wide), "t_embedder.1.linear_2")
        yield _renamed("time_embed.norm", (wide,), "t_embedding_norm")
        for n in range(self.layers):
            yield from self._block(f"transformer_blocks.{n}", f"blocks.{n}")
        yield _renamed("norm_out.linear_1", (self.modulation, wide), "final_layer.adaln_modulation.1")
        yield _renamed("norm_out.linear_2", (2 * wide, self.modulation), "final_layer.adaln_modulation.2")
        yield _renamed("proj_out", (area * self.channels, wide), "final_layer.linear")

    def _block(self, ours: str, theirs: str) -> Iterator[TensorRow]:
        yield from self._modulation(f"{ours}.norm1", f"{theirs}.adaln_modulation_self_attn")
        yield from self._attention(f"{ours}.attn1", f"{theirs}.self_attn", self.width)
        yield from self._modulation(f"{ours}.norm2", f"{theirs}.adaln_modulation_cross_attn")
        yield from self._attention(f"{ours}.attn2", f"{theirs}.cross_attn", self.text_width)
        yield from self._modulation(f"{ours}.norm3", f"{theirs}.adaln_modulation_mlp")
        yield _renamed(f"{ours}.ff.net.0.proj", (self.hidden, self.width), f"{theirs}.mlp.layer1")
        yield _renamed(f"{ours}.ff.net.2", (self.width, self.hidden), f"{theirs}.mlp.layer2")

    def _modulation(self, ours: str, theirs: str) -> Iterator[TensorRow]:
        yield _renamed(f"{ours}.linear_1", (self.modulation, self.width), f"{theirs}.1")
        yield _renamed(f"{ours}.linear_2", (3 * self.width, self.modulation), f"{theirs}.2")

    def _attention(self, ours: str, theirs: str, read: int) -> Iterator[TensorRow]:
        """Yield the table of an attention. ``read``: width of what gives keys and values."""
        for name, old, columns in (("to_q", "q_proj", self.width), ("to_k", "k_proj", read), ("to_v", "v_proj", read)):
            yield _renamed(f"{ours}.{name}", (self.width, columns), f"{theirs}.{old}")
        for name, old in (("norm_q", "q_norm"), ("norm_k", "k_norm")):
            yield _renamed(f"{ours}.{name}", (self.head_size,), f"{theirs}.{old}")
        yield _renamed(f"{ours}.to_out.0", (self.width, self.width), f"{theirs}.output_proj")


def _renamed(ours: str, shape: tuple[int, ...], theirs: str) -> TensorRow:
    return row(f"{ours}.weight", shape, f"{theirs}.weight")


def infer(shapes: Shapes) -> AnimaConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    original = any(name.startswith("x_embedder.") for name in shapes)
    embedder, last = ("x_embedder.proj.1", "final_layer.linear") if original else ("patch_embed.proj", "proj_out")
    block, attention, cross, norm, feed, modulation = (
        ("blocks", "self_attn", "cross_attn.k_proj", "q_norm", "mlp.layer1", "adaln_modulation_mlp.1")
        if original
        else ("transformer_blocks", "attn1", "attn2.to_k", "norm_q", "ff.net.0.proj", "norm3.linear_1")
    )
    try:
        # No unpacking: a wrong number of axes is better named as a wrong shape.
        return AnimaConfig(
            shapes[f"{last}.weight"][0] // PATCH**2,
            shapes[f"{embedder}.weight"][0],
            count_indexed(shapes, f"{block}."),
            shapes[f"{block}.0.{feed}.weight"][0],
            shapes[f"{block}.0.{attention}.{norm}.weight"][0],
            shapes[f"{block}.0.{cross}.weight"][-1],
            shapes[f"{block}.0.{modulation}.weight"][0],
        )
    except (KeyError, IndexError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the transformer may be left over, None if it may not. ``name``: without prefix."""
    return "a number of training, or computed from its settings" if _UNREAD.match(name) else None


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``L00`` and so on, else ``BASE``."""
    for name in names:
        found = _NUMBERED.match(name)
        if found is not None:
            return f"L{int(found[2]):02d}"
    return "BASE"
