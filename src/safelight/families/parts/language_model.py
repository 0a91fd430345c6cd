"""What the tables of language models have in common: the layers of a decoder, and what names may begin with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.components import Config
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, row

PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
"""What the names of tensors begin with: none for transformers' class without a head, ``model.`` for the whole language
model, the others in files of models that also see images."""

HEAD = r"(model\.|language_model\.)*"
"""Matches each of :data:`PREFIXES`."""


@dataclass(frozen=True, slots=True)
class LanguageModelConfig(Config):
    """Settings that all language models have.

    ``layers``: how many layers are computed.
    ``key_heads``: heads of keys and values, each shared by several query heads.
    """

    tokens: ClassVar[int] = 512
    """The most tokens that a family gives it, for the estimate of the working memory."""

    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int

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
        return self.text_bytes(self.tokens, itemsize)

    def text_bytes(self, tokens: int, itemsize: int) -> int:
        states = tokens * (6 * self.width + 3 * self.intermediate) * itemsize
        # The norms compute in fp32, and the mask has a number for each pair of tokens.
        return states + 3 * tokens * self.width * 4 + 2 * self.heads * tokens**2 * itemsize

    def decoder_rows(self, head_size: int, biases: bool = False, norms: bool = False) -> Iterator[TensorRow]:
        """Yield the table of the embeddings and of all layers.

        ``head_size``: width of an attention head.
        ``biases``: the projections to queries, keys and values have biases.
        ``norms``: queries and keys are normalised.
        """
        wide = self.width
        yield decoder_row("embed_tokens.weight", (self.vocabulary, wide))
        for n in range(self.layers):
            layer, attention = f"layers.{n}", f"layers.{n}.self_attn"
            yield decoder_row(f"{layer}.input_layernorm.weight", (wide,))
            for name, heads in (("q_proj", self.heads), ("k_proj", self.key_heads), ("v_proj", self.key_heads)):
                yield decoder_row(f"{attention}.{name}.weight", (heads * head_size, wide))
                if biases:
                    yield decoder_row(f"{attention}.{name}.bias", (heads * head_size,))
            for name in ("q_norm", "k_norm") if norms else ():
                yield decoder_row(f"{attention}.{name}.weight", (head_size,))
            yield decoder_row(f"{attention}.o_proj.weight", (wide, self.heads * head_size))
            yield decoder_row(f"{layer}.post_attention_layernorm.weight", (wide,))
            yield decoder_row(f"{layer}.mlp.gate_proj.weight", (self.intermediate, wide))
            yield decoder_row(f"{layer}.mlp.up_proj.weight", (self.intermediate, wide))
            yield decoder_row(f"{layer}.mlp.down_proj.weight", (wide, self.intermediate))


def decoder_row(name: str, shape: tuple[int, ...]) -> TensorRow:
    """Return the row of a tensor whose name in files may have any of :data:`PREFIXES`."""
    return row(name, shape, *(prefix + name for prefix in PREFIXES[1:]))


def find_prefix(shapes: Shapes) -> str:
    """Return what the names in a file begin with. Raises NotThisArchitecture for a file without embeddings."""
    found = next((one for one in PREFIXES if f"{one}embed_tokens.weight" in shapes), None)
    if found is None:
        raise NotThisArchitecture("the text encoder has no tensor embed_tokens.weight")
    return found


def counts_for_layer_number(name: str) -> bool:
    """Return whether the number of layers is inferred from a tensor, although nothing computes with it."""
    return re.match(rf"{HEAD}layers\.[0-9]+\.", name) is not None


def is_in_layer_after(name: str, after: int) -> bool:
    """Return whether a tensor of the module belongs to a layer after the first ``after``."""
    found = re.match(r"layers\.([0-9]+)\.", name)
    return found is not None and int(found[1]) >= after
