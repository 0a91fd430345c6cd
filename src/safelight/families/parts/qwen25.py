"""The language model of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) as a text encoder: the table of its tensors.

The model also has a vision tower and an output head. A text needs neither, so they are not in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from safelight.families.parts import qwen3
from safelight.families.parts.language_model import HEAD, LanguageModelConfig, decoder_row, find_prefix
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed
from safelight.families.tokenizer_file import TokenizerFile

PATTERN = rf"{HEAD}layers\.0\.self_attn\.q_proj\.bias$"
"""Matches a tensor that a Qwen2 or Qwen2.5 has, and a Qwen3 and most other language models do not."""

PICTURE_TOKEN = 151655
"""The id of ``<|image_pad|>``, in whose places the language model reads what the vision encoder returned."""

SHIPPED = replace(qwen3.SHIPPED, name="Qwen2.5", end=151665, fixed=(("<|image_pad|>", PICTURE_TOKEN),))
"""Its tokenizer. Qwen3's has four tokens more, for tool calls and for thinking."""

TOKENIZER = TokenizerFile("tokenizer/tokenizer.json", shipped=SHIPPED)

HEAD_SIZE = 128
"""Width of an attention head. Shapes do not tell it. A model with a single narrower head for keys has that width."""

_UNREAD = {
    r"(model\.)?visual\.": "of the vision tower, which a text does not need",
    r"lm_head\.": "of the output head, which nothing reads",
}


@dataclass(frozen=True, slots=True)
class Qwen25Config(LanguageModelConfig):
    """Settings of a Qwen2.5 language model."""

    architecture: ClassVar[str] = "qwen2.5"
    tokens: ClassVar[int] = 1058

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def rows(self) -> Iterator[TensorRow]:
        yield from self.decoder_rows(self.head_size, biases=True)
        yield decoder_row("norm.weight", (self.width,))


def infer(shapes: Shapes) -> Qwen25Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    prefix = find_prefix(shapes)
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
