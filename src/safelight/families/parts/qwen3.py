"""The language model Qwen3 (Yang et al. 2025, arXiv 2505.09388) as a text encoder: the table of its tensors.

Families read a hidden layer. The layers behind it, the final norm and the output head are not used, so they are not in
the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from safelight.families.parts.language_model import HEAD, LanguageModelConfig, find_prefix
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row
from safelight.families.tokenizer_file import ShippedTokenizer, TokenizerFile

PATTERN = r"(model\.|language_model\.)*layers\.[0-9]+\.self_attn\.q_norm\."
"""Matches tensors that a Qwen3 has, and its predecessors and most other language models do not."""

VISION = r"(model\.)?visual\."
"""Matches the tensors of a vision tower: then it is another model, such as Qwen3-VL."""

UNREAD_LAYERS = 1
"""Layers at the end that no family reads, and that are not in the table.

Z-Image reads the last layer but one, FLUX.2 klein none after the 27th of 36. With the same table for both, the text
encoder that both have is the same component with the same digest: it is stored and resident once.
"""

PAD = 151643
"""The id of ``<|endoftext|>``, which pads prompts."""

SHIPPED = ShippedTokenizer(
    "Qwen3", Path(__file__).with_name("qwen3_tokenizer.json.gz"), fixed=(("<|endoftext|>", PAD),)
)
"""The tokenizer that every Qwen3 has. Its licence is in the same folder."""

TOKENIZER = TokenizerFile("tokenizer/tokenizer.json", shipped=SHIPPED)

FEWEST_ROWS = 151669
"""Tokens of the tokenizer. The table of embeddings has a row for each, and some more."""

_UNREAD = re.compile(rf"{HEAD}(layers\.[0-9]+\.|norm\.weight$)|lm_head\.")


@dataclass(frozen=True, slots=True)
class Qwen3Config(LanguageModelConfig):
    """Settings of a Qwen3.

    ``layers``: how many layers are computed, which is fewer than the file has.
    ``head_size``: width of an attention head.
    """

    architecture: ClassVar[str] = "qwen3"
    head_size: int

    def rows(self) -> Iterator[TensorRow]:
        return self.decoder_rows(self.head_size, norms=True)

    @property
    def published(self) -> Qwen3Config:
        return replace(self, layers=self.layers + UNREAD_LAYERS)

    def unread_rows(self) -> Iterator[TensorRow]:
        own = {row.name for row in self.rows()}
        yield from (row for row in self.published.rows() if row.name not in own)
        yield row("norm.weight", (self.width,))


def infer(shapes: Shapes) -> Qwen3Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    prefix = find_prefix(shapes)
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
