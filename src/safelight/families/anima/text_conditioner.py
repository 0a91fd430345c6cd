"""The table of Anima's text conditioner, which it calls LLM adapter. Names are those of ``AnimaTextConditioner``.

Its queries are the T5 tokens of a prompt; it reads what Qwen3 returned for the same prompt. The original has the same
names, and keeps it in the transformer's file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias

TOKENS = 512
"""The most tokens of each tokenizer. It returns this number of hidden states."""

EMBEDDINGS = "embed.weight"
"""The table of embeddings, with a row for each token of T5."""

_UNREAD = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class AnimaConditionerConfig(Config):
    """Settings of a text conditioner.

    ``source_width``: width of the text encoder's hidden states.
    ``target_width``: width of what it returns.
    ``hidden``: width of the feed-forward layers.
    ``head_size``: width of an attention head.
    """

    architecture: ClassVar[str] = "anima-text-conditioner"
    vocabulary: int
    source_width: int
    target_width: int
    width: int
    hidden: int
    layers: int
    head_size: int

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    @property
    def hidden_size(self) -> int:
        return self.target_width

    @property
    def encoder_layers(self) -> int:
        return self.layers

    @property
    def depends_on_size(self) -> bool:
        return False

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        del pixels
        scores = self.width // self.head_size * TOKENS**2 * itemsize if quadratic else 0
        return TOKENS * (8 * self.width + 2 * self.hidden) * itemsize + scores

    def rows(self) -> Iterator[TensorRow]:
        wide = self.width
        yield row(EMBEDDINGS, (self.vocabulary, self.target_width))
        if wide != self.target_width:
            yield from weight_and_bias("in_proj", (wide, self.target_width))
        for n in range(self.layers):
            yield from self._block(f"blocks.{n}")
        yield from weight_and_bias("out_proj", (self.target_width, wide))
        yield row("norm.weight", (self.target_width,))

    def _block(self, name: str) -> Iterator[TensorRow]:
        wide = self.width
        for attention, read in (("self_attn", wide), ("cross_attn", self.source_width)):
            yield row(f"{name}.norm_{attention}.weight", (wide,))
            yield row(f"{name}.{attention}.q_proj.weight", (wide, wide))
            yield row(f"{name}.{attention}.q_norm.weight", (self.head_size,))
            yield row(f"{name}.{attention}.k_proj.weight", (wide, read))
            yield row(f"{name}.{attention}.k_norm.weight", (self.head_size,))
            yield row(f"{name}.{attention}.v_proj.weight", (wide, read))
            yield row(f"{name}.{attention}.o_proj.weight", (wide, wide))
        yield row(f"{name}.norm_mlp.weight", (wide,))
        yield from weight_and_bias(f"{name}.mlp.0", (self.hidden, wide))
        yield from weight_and_bias(f"{name}.mlp.2", (wide, self.hidden))


def infer(shapes: Shapes) -> AnimaConditionerConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        vocabulary, target = shapes[EMBEDDINGS]
        return AnimaConditionerConfig(
            vocabulary,
            shapes["blocks.0.cross_attn.k_proj.weight"][1],
            target,
            shapes["blocks.0.self_attn.q_proj.weight"][0],
            shapes["blocks.0.mlp.0.weight"][0],
            count_indexed(shapes, "blocks."),
            shapes["blocks.0.self_attn.q_norm.weight"][0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise NotThisArchitecture(f"the text conditioner has no tensor {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the text conditioner may be left over, None if not. ``name``: without prefix."""
    return "computed from its settings" if _UNREAD.match(name) else None
