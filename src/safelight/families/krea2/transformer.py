"""The table of Krea 2's transformer. Names are those of ``diffusers.Krea2Transformer2DModel`` and of the original."""

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
    TensorSource,
    count_indexed,
    row,
    weight_and_bias,
)

TEXT_TOKENS = 512
"""Tokens of the text that it reads, padding included."""

_NUMBERED = re.compile(r"(transformer_blocks|blocks)\.([0-9]+)\.")

_FP32 = frozenset({"norm", "norm1", "norm2", "norm_q", "norm_k"})
"""Modules that diffusers keeps in fp32: it adds 1 to their weights."""


@dataclass(frozen=True, slots=True)
class Krea2Config(Config):
    """Settings of a Krea 2 transformer.

    ``channels``: of the VAE's latents.
    ``head_size``: width of an attention head.
    ``key_heads``: heads of keys and values, each shared by several query heads.
    ``hidden``: width of the feed-forward layers.
    ``time_width``: width of the time embedding's input.
    ``text_width``: width of the text encoder's hidden states.
    ``text_layers``: how many layers of the text encoder it reads.
    ``text_head_size``, ``text_key_heads``, ``text_hidden``: as without ``text_``, of the blocks for the text alone.
    ``layerwise_blocks``: blocks that compute on the layers of each text token.
    ``refiner_blocks``: blocks that compute on all text tokens.
    """

    architecture: ClassVar[str] = "krea2"
    channels: int
    width: int
    layers: int
    head_size: int
    key_heads: int
    hidden: int
    time_width: int
    text_width: int
    text_layers: int
    text_head_size: int
    text_key_heads: int
    text_hidden: int
    layerwise_blocks: int
    refiner_blocks: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    def keeps_fp32(self, name: str) -> bool:
        return not _FP32.isdisjoint(name.split("."))

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        # A call has one row. The text blocks have all layers of all text tokens at once.
        text = TEXT_TOKENS * self.text_layers * (6 * self.text_width + 3 * self.text_hidden) * itemsize
        tokens = pixels // 256 + TEXT_TOKENS
        scores = self.width // self.head_size * tokens**2 * itemsize if quadratic else 0
        # Norms and rotary embeddings compute in fp32. Attention repeats the keys and values for all query heads.
        states = tokens * (8 * self.width + 3 * self.hidden) * itemsize + 4 * tokens * self.width * 4
        # Attention has a mask with a number for each pair of tokens.
        return max(text, states + tokens**2 * itemsize + scores)

    def rows(self) -> Iterator[TensorRow]:
        wide, patch = self.width, self.channels * PATCH**2
        yield from weight_and_bias("time_embed.linear_1", (wide, self.time_width), "tmlp.0")
        yield from weight_and_bias("time_embed.linear_2", (wide, wide), "tmlp.2")
        yield from weight_and_bias("time_mod_proj", (6 * wide, wide), "tproj.1")
        for n in range(self.layerwise_blocks):
            yield from self._text_block(f"layerwise_blocks.{n}")
        yield row("text_fusion.projector.weight", (1, self.text_layers), "txtfusion.projector.weight")
        for n in range(self.refiner_blocks):
            yield from self._text_block(f"refiner_blocks.{n}")
        yield row("txt_in.norm.weight", (self.text_width,), "txtmlp.0.scale")
        yield from weight_and_bias("txt_in.linear_1", (wide, self.text_width), "txtmlp.1")
        yield from weight_and_bias("txt_in.linear_2", (wide, wide), "txtmlp.3")
        yield from weight_and_bias("img_in", (wide, patch), "first")
        for n in range(self.layers):
            ours, theirs = f"transformer_blocks.{n}", f"blocks.{n}"
            table = TensorSource(f"{theirs}.mod.lin", flattened=True)
            yield row(f"{ours}.scale_shift_table", (6, wide), table)
            sizes = (wide, self.head_size, self.key_heads, self.hidden)
            yield from _block(ours, theirs, *sizes)
        yield row("final_layer.scale_shift_table", (2, wide), TensorSource("last.modulation.lin", flattened=True))
        yield row("final_layer.norm.weight", (wide,), "last.norm.scale")
        yield from weight_and_bias("final_layer.linear", (patch, wide), "last.linear")

    def _text_block(self, name: str) -> Iterator[TensorRow]:
        sizes = (self.text_width, self.text_head_size, self.text_key_heads, self.text_hidden)
        yield from _block(f"text_fusion.{name}", f"txtfusion.{name}", *sizes)


def _block(ours: str, theirs: str, width: int, head_size: int, key_heads: int, hidden: int) -> Iterator[TensorRow]:
    attention, other = f"{ours}.attn", f"{theirs}.attn"
    keys = key_heads * head_size
    yield row(f"{ours}.norm1.weight", (width,), f"{theirs}.prenorm.scale")
    for name, old, rows in (("to_q", "wq", width), ("to_k", "wk", keys), ("to_v", "wv", keys)):
        yield row(f"{attention}.{name}.weight", (rows, width), f"{other}.{old}.weight")
    yield row(f"{attention}.to_gate.weight", (width, width), f"{other}.gate.weight")
    for name, old in (("norm_q", "qnorm"), ("norm_k", "knorm")):
        yield row(f"{attention}.{name}.weight", (head_size,), f"{other}.qknorm.{old}.scale")
    yield row(f"{attention}.to_out.0.weight", (width, width), f"{other}.wo.weight")
    yield row(f"{ours}.norm2.weight", (width,), f"{theirs}.postnorm.scale")
    for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        yield row(f"{ours}.ff.{name}.weight", shape, f"{theirs}.mlp.{name}.weight")


def infer(shapes: Shapes) -> Krea2Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    original = any(name.startswith("txtfusion.") for name in shapes)
    blocks, fusion = ("blocks", "txtfusion") if original else ("transformer_blocks", "text_fusion")
    image, time, text = (
        ("first", "tmlp.0", "txtmlp.1") if original else ("img_in", "time_embed.linear_1", "txt_in.linear_1")
    )
    key, norm, feed = (
        ("attn.wk", "attn.qknorm.knorm.scale", "mlp.gate")
        if original
        else ("attn.to_k", "attn.norm_k.weight", "ff.gate")
    )
    refiner = f"{fusion}.refiner_blocks.0"
    try:
        width, patch = shapes[f"{image}.weight"]
        head_size, text_head_size = shapes[f"{blocks}.0.{norm}"][0], shapes[f"{refiner}.{norm}"][0]
        return Krea2Config(
            patch // PATCH**2,
            width,
            count_indexed(shapes, f"{blocks}."),
            head_size,
            shapes[f"{blocks}.0.{key}.weight"][0] // head_size,
            shapes[f"{blocks}.0.{feed}.weight"][0],
            shapes[f"{time}.weight"][1],
            shapes[f"{text}.weight"][1],
            shapes[f"{fusion}.projector.weight"][1],
            text_head_size,
            shapes[f"{refiner}.{key}.weight"][0] // text_head_size,
            shapes[f"{refiner}.{feed}.weight"][0],
            count_indexed(shapes, f"{fusion}.layerwise_blocks."),
            count_indexed(shapes, f"{fusion}.refiner_blocks."),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise NotThisArchitecture(f"the transformer has no tensor {error}") from error


def block_of(names: Iterable[str]) -> str:
    """Return the block that contains a module: ``L00`` and so on for the common layers, else ``BASE``."""
    for name in names:
        found = _NUMBERED.match(name)
        if found is not None:
            return f"L{int(found[2]):02d}"
    return "BASE"
