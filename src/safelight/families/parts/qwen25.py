"""The language model of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) as a text encoder: the table of its tensors.

The model also has a vision tower and an output head. A text needs neither, so they are not in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row, weight_and_bias

HEAD_PREFIXES = ("", "model.", "language_model.", "model.language_model.")
"""What the names of its tensors begin with. In files of the whole model they begin with ``model.``, and since
transformers 4.52 with ``model.language_model.``."""

PATTERN = r"(model\.|language_model\.)*layers\.0\.self_attn\.q_proj\.bias$"
"""Matches a tensor that a Qwen2 or Qwen2.5 has, and a Qwen3 and most other language models do not."""

HEAD_SIZE = 128
"""Width of an attention head. Shapes do not tell it. A model with a single narrower head for keys has that width."""

TOKENS = 1058
"""The most tokens that a family gives it, for the estimate of the working memory."""

_UNREAD = {
    r"(model\.)?visual\.": "of the vision tower, which a text does not need",
    r"lm_head\.": "of the output head, which nothing reads",
}


@dataclass(frozen=True, slots=True)
class Qwen25Config(Config):
    """Settings of a Qwen2.5 language model.

    ``key_heads``: heads of keys and values, each shared by several query heads.
    """

    architecture: ClassVar[str] = "qwen2.5"
    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def rows(self) -> Iterator[TensorRow]:
        yield _row("embed_tokens.weight", (self.vocabulary, self.width))
        for n in range(self.layers):
            layer, attention = f"layers.{n}", f"layers.{n}.self_attn"
            yield _row(f"{layer}.input_layernorm.weight", (self.width,))
            for name, heads in (("q_proj", self.heads), ("k_proj", self.key_heads), ("v_proj", self.key_heads)):
                projection = f"{attention}.{name}"
                others = (prefix + projection for prefix in HEAD_PREFIXES[1:])
                yield from weight_and_bias(projection, (heads * self.head_size, self.width), *others)
            yield _row(f"{attention}.o_proj.weight", (self.width, self.width))
            yield _row(f"{layer}.post_attention_layernorm.weight", (self.width,))
            yield _row(f"{layer}.mlp.gate_proj.weight", (self.intermediate, self.width))
            yield _row(f"{layer}.mlp.up_proj.weight", (self.intermediate, self.width))
            yield _row(f"{layer}.mlp.down_proj.weight", (self.width, self.intermediate))
        yield _row("norm.weight", (self.width,))

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


def infer(shapes: Shapes) -> Qwen25Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    prefix = next((one for one in HEAD_PREFIXES if f"{one}embed_tokens.weight" in shapes), None)
    if prefix is None:
        raise NotThisArchitecture("the text encoder has no tensor embed_tokens.weight")
    try:
        attention = f"{prefix}layers.0.self_attn"
        vocabulary, width = shapes[f"{prefix}embed_tokens.weight"]
        keys = shapes[f"{attention}.k_proj.bias"][0]
        head_size = min(HEAD_SIZE, keys)
        return Qwen25Config(
            vocabulary,
            width,
            shapes[f"{prefix}layers.0.mlp.gate_proj.weight"][0],
            count_indexed(shapes, f"{prefix}layers."),
            shapes[f"{attention}.q_proj.bias"][0] // head_size,
            keys // head_size,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise NotThisArchitecture(f"the text encoder is no Qwen2.5: {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the text encoder may be left over, None if it may not. ``name``: without prefix."""
    return next((reason for pattern, reason in _UNREAD.items() if re.match(pattern, name)), None)
