"""Anima's text encoder, Qwen3-0.6B: the table of its tensors.

Anima reads what the whole model returns. The families with other sizes of Qwen3 read a hidden layer of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.parts import qwen3
from safelight.families.parts.language_model import HEAD, decoder_row, find_prefix
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed

QUERY_RATIO = 2
"""Its queries are so many times as wide as its hidden states. This tells it from the larger sizes of Qwen3."""

UNREAD = rf"{HEAD}lm_head\."
"""Matches the output head, which nothing reads."""


@dataclass(frozen=True, slots=True)
class Qwen3SmallConfig(Qwen3Config):
    """Settings of a Qwen3-0.6B, of which all layers and the final norm are computed."""

    architecture: ClassVar[str] = "qwen3-0.6b"

    def rows(self) -> Iterator[TensorRow]:
        yield from self.decoder_rows(self.head_size, norms=True)
        yield decoder_row("norm.weight", (self.width,))

    @property
    def published(self) -> Qwen3SmallConfig:
        return self

    def unread_rows(self) -> Iterator[TensorRow]:
        return iter(())


def infer(shapes: Shapes) -> Qwen3SmallConfig:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    found = qwen3.infer(shapes)
    queries = found.heads * found.head_size
    if queries != QUERY_RATIO * found.width:
        size = f"its queries are {queries} wide, its hidden states {found.width}"
        raise NotThisArchitecture(f"the text encoder is no Qwen3-0.6B: {size}")
    layers = count_indexed(shapes, f"{find_prefix(shapes)}layers.")
    return Qwen3SmallConfig(
        found.vocabulary, found.width, found.intermediate, layers, found.heads, found.key_heads, found.head_size
    )
