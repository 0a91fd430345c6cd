"""The language model Qwen3 (Yang et al. 2025, arXiv 2505.09388) as a text encoder: the table of its tensors.

Families read a hidden layer. The layers behind it, the final norm and the output head are not used, so they are not in
the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row

HEAD_PREFIXES = ("", "model.", "language_model.", "model.language_model.")
"""What the names of its tensors begin with: none for transformers' ``Qwen3Model``, ``model.`` for the whole language
model, the others in files of models that also see images."""

PATTERN = r"(model\.|language_model\.)*layers\.[0-9]+\.self_attn\.q_norm\."
"""Matches tensors that a Qwen3 has, and its predecessors and most other language models do not."""

VISION = r"(model\.)?visual\."
"""Matches the tensors of a vision tower: then it is another model, such as Qwen3-VL."""

UNREAD_LAYERS = 1
"""Layers at the end that no family reads, and that are not in the table.

Z-Image reads the last layer but one, FLUX.2 klein none after the 27th of 36. With the same table for both, the text
encoder that both have is the same component with the same digest: it is stored and resident once.
"""

FEWEST_ROWS = 151669
"""Tokens of the tokenizer. The table of embeddings has a row for each, and some more."""

TOKENS = 512
"""The most tokens that a family gives it, for the estimate of the working memory."""

_UNREAD = re.compile(r"(model\.|language_model\.)*(layers\.[0-9]+\.|norm\.weight$)|lm_head\.")


@dataclass(frozen=True, slots=True)
class Qwen3Config(Config):
    """Settings of a Qwen3.

    ``layers``: how many layers are computed, which is fewer than the file has.
    ``head_size``: width of an attention head.
    ``key_heads``: heads of keys and values, each shared by several query heads.
    """

    architecture: ClassVar[str] = "qwen3"
    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int

    def rows(self) -> Iterator[TensorRow]:
        yield _row("embed_tokens.weight", (self.vocabulary, self.width))
        for n in range(self.layers):
            layer, attention = f"layers.{n}", f"layers.{n}.self_attn"
            yield _row(f"{layer}.input_layernorm.weight", (self.width,))
            for name, heads in (("q_proj", self.heads), ("k_proj", self.key_heads), ("v_proj", self.key_heads)):
                yield _row(f"{attention}.{name}.weight", (heads * self.head_size, self.width))
            yield _row(f"{attention}.q_norm.weight", (self.head_size,))
            yield _row(f"{attention}.k_norm.weight", (self.head_size,))
            yield _row(f"{attention}.o_proj.weight", (self.width, self.heads * self.head_size))
            yield _row(f"{layer}.post_attention_layernorm.weight", (self.width,))
            yield _row(f"{layer}.mlp.gate_proj.weight", (self.intermediate, self.width))
            yield _row(f"{layer}.mlp.up_proj.weight", (self.intermediate, self.width))
            yield _row(f"{layer}.mlp.down_proj.weight", (self.width, self.intermediate))

    @property
    def published(self) -> Qwen3Config:
        return replace(self, layers=self.layers + UNREAD_LAYERS)

    def unread_rows(self) -> Iterator[TensorRow]:
        own = {row.name for row in self.rows()}
        yield from (row for row in self.published.rows() if row.name not in own)
        yield row("norm.weight", (self.width,))

    @property
    def label(self) -> str:
        return f"{self.width}x{self.layers}"

    @property
    def hidden_size(self) -> int:
        return self.width

    @property
    def encoder_layers(self) -> int:
        return self.layers

    @property
    def depends_on_size(self) -> bool:
        return False

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        del pixels, quadratic
        states = TOKENS * (6 * self.width + 3 * self.intermediate) * itemsize
        # The norms compute in fp32, and the mask has a number for each pair of tokens.
        return states + 3 * TOKENS * self.width * 4 + 2 * self.heads * TOKENS**2 * itemsize


def _row(name: str, shape: tuple[int, ...]) -> TensorRow:
    return row(name, shape, *(prefix + name for prefix in HEAD_PREFIXES[1:]))


def infer(shapes: Shapes) -> Qwen3Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    prefix = next((one for one in HEAD_PREFIXES if f"{one}embed_tokens.weight" in shapes), None)
    if prefix is None:
        raise NotThisArchitecture("the text encoder has no tensor embed_tokens.weight")
    try:
        attention = f"{prefix}layers.0.self_attn"
        vocabulary, width = shapes[f"{prefix}embed_tokens.weight"]
        if vocabulary < FEWEST_ROWS:
            few = f"it has {vocabulary} rows, fewer than Qwen3 has tokens, {FEWEST_ROWS}"
            raise NotThisArchitecture(few, f"{prefix}embed_tokens.weight")
        head_size = shapes[f"{attention}.q_norm.weight"][0]
        return Qwen3Config(
            vocabulary,
            width,
            shapes[f"{prefix}layers.0.mlp.gate_proj.weight"][0],
            max(1, count_indexed(shapes, f"{prefix}layers.") - UNREAD_LAYERS),
            shapes[f"{attention}.q_proj.weight"][0] // head_size,
            shapes[f"{attention}.k_proj.weight"][0] // head_size,
            head_size,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise NotThisArchitecture(f"the text encoder is no Qwen3: {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the text encoder may be left over, None if it may not. ``name``: without prefix."""
    return "behind the hidden layer that is read" if _UNREAD.match(name) else None


def counts_for_layer_number(name: str) -> bool:
    """Return whether the number of layers is inferred from a tensor, although nothing computes with it."""
    return re.match(r"(model\.|language_model\.)*layers\.[0-9]+\.", name) is not None
