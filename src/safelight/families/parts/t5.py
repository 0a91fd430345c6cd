"""The encoder of the language model T5 1.1 (Raffel et al. 2020, arXiv 1910.10683) as a text encoder: its tensors.

Names are those of ``transformers.T5EncoderModel``. Its two names of the token embeddings are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed, row
from safelight.families.tokenizer_file import ShippedTokenizer

EMBEDDINGS = "shared.weight"
SAME_EMBEDDINGS = "encoder.embed_tokens.weight"

PATTERN = r"encoder\.block\.[0-9]+\.layer\.1\.DenseReluDense\.wi_1\."
"""Matches tensors that T5 1.1 has, and CLIP and T5 1.0 do not."""

PAD, END = 0, 1
"""The ids of ``<pad>`` and ``</s>``."""

SHIPPED = ShippedTokenizer(
    "T5 1.1", Path(__file__).with_name("t5_tokenizer.json.gz"), fixed=(("<pad>", PAD), ("</s>", END))
)
"""The tokenizer that every T5 1.1 has. Its licence is in the same folder."""

FEWEST_ROWS = 32100
"""Tokens of the tokenizer. The table of embeddings has a row for each, and some more."""

BUCKETS = 32
"""How many distances between two tokens have a bias of their own, in each T5."""

TOKENS = 512
"""The most tokens that a family gives it, for the estimate of the working memory."""


@dataclass(frozen=True, slots=True)
class T5Config(Config):
    """Settings of a T5 encoder.

    ``head_size``: width of an attention head.
    ``buckets``: how many distances between two tokens have a bias of their own.
    """

    architecture: ClassVar[str] = "t5"
    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    head_size: int
    buckets: int = BUCKETS

    def rows(self) -> Iterator[TensorRow]:
        inner = self.heads * self.head_size
        yield row(EMBEDDINGS, (self.vocabulary, self.width), SAME_EMBEDDINGS)
        for n in range(self.layers):
            first, second = f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
            yield row(f"{first}.layer_norm.weight", (self.width,))
            for name in ("q", "k", "v"):
                yield row(f"{first}.SelfAttention.{name}.weight", (inner, self.width))
            if n == 0:
                yield row(f"{first}.SelfAttention.relative_attention_bias.weight", (self.buckets, self.heads))
            yield row(f"{first}.SelfAttention.o.weight", (self.width, inner))
            yield row(f"{second}.layer_norm.weight", (self.width,))
            for name in ("wi_0", "wi_1"):
                yield row(f"{second}.DenseReluDense.{name}.weight", (self.intermediate, self.width))
            yield row(f"{second}.DenseReluDense.wo.weight", (self.width, self.intermediate))
        yield row("encoder.final_layer_norm.weight", (self.width,))

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
        # The norms compute in fp32, and each pair of tokens has a bias in every head.
        return states + 3 * TOKENS * self.width * 4 + 3 * self.heads * TOKENS**2 * itemsize


T5_XXL = T5Config(32128, 4096, 10240, 24, 64, 64)


def infer(shapes: Shapes) -> T5Config:
    """Infer the settings from shapes. Raises NotThisArchitecture."""
    try:
        embeddings = EMBEDDINGS if EMBEDDINGS in shapes else SAME_EMBEDDINGS
        vocabulary, width = shapes[embeddings]
        if vocabulary < FEWEST_ROWS:
            few = f"it has {vocabulary} rows, fewer than T5 has tokens, {FEWEST_ROWS}"
            raise NotThisArchitecture(few, embeddings)
        attention = "encoder.block.0.layer.0.SelfAttention"
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        if buckets != BUCKETS:
            other = f"it has {buckets} rows, not {BUCKETS}"
            raise NotThisArchitecture(other, f"{attention}.relative_attention_bias.weight")
        return T5Config(
            vocabulary,
            width,
            shapes["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"][0],
            count_indexed(shapes, "encoder.block."),
            heads,
            shapes[f"{attention}.q.weight"][0] // heads,
            buckets,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise NotThisArchitecture(f"the text encoder is no T5 1.1: {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the text encoder may be left over, None if it may not. ``name``: without prefix."""
    if name == SAME_EMBEDDINGS:
        return f"the same tensor as {EMBEDDINGS}"
    return "not used" if re.fullmatch(r"logit_scale|spiece_model", name) else None


def folder_settings(role: str) -> Iterable[tuple[str, str, object]]:
    """Yield what ``config.json`` of a T5 1.1 says; see :attr:`safelight.families.family.Family.folder_settings`."""
    yield role, "feed_forward_proj", "gated-gelu"
    yield role, "relative_attention_max_distance", 128
    yield role, "layer_norm_epsilon", 1e-6
