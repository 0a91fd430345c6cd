"""The language model Ministral 3 as a text encoder: the table of its tensors.

Families read a hidden layer. The layers behind it, the final norm and the output head are not used, so they are not in
the table; nor is what sees images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from safelight.families.parts.language_model import HEAD, LanguageModelConfig, find_prefix
from safelight.families.tables import NotThisArchitecture, Shapes, TensorRow, count_indexed

VISION = r"(model\.)?(vision_tower|multi_modal_projector)\."
"""Matches tensors of what sees images. ERNIE-Image's prompt enhancer, which has the same language model, lacks it."""

ROPE = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "max_position_embeddings": 262144,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Settings of the rotary embedding."""

HEAD_SIZE = 128
"""Width of an attention head, in all sizes of the model."""

NORM_EPSILON = 1e-5
POSITIONS = 262144

EXPORT_PROBLEM = "Safelight reads the text encoder without its last layers, and diffusers' pipeline needs them"

_UNREAD = re.compile(rf"{HEAD}(layers\.[0-9]+\.|norm\.weight$)|{HEAD}lm_head\.|{VISION}|tekken_model$")


@dataclass(frozen=True, slots=True)
class Ministral3Config(LanguageModelConfig):
    """Settings of a Ministral 3.

    ``layers``: how many layers are computed, which is fewer than the file has.
    """

    architecture: ClassVar[str] = "ministral3"

    def rows(self) -> Iterator[TensorRow]:
        return self.decoder_rows(HEAD_SIZE)


def infer(shapes: Shapes, unread: int) -> Ministral3Config:
    """Infer the settings from shapes. ``unread``: how many layers at the end the family does not read.

    Raises NotThisArchitecture.
    """
    prefix = find_prefix(shapes)
    attention = f"{prefix}layers.0.self_attn"
    if f"{attention}.q_norm.weight" in shapes:
        raise NotThisArchitecture("the text encoder is no Ministral 3: it normalises its queries")
    try:
        vocabulary, width = shapes[f"{prefix}embed_tokens.weight"]
        return Ministral3Config(
            vocabulary,
            width,
            shapes[f"{prefix}layers.0.mlp.gate_proj.weight"][0],
            max(1, count_indexed(shapes, f"{prefix}layers.") - unread),
            shapes[f"{attention}.q_proj.weight"][0] // HEAD_SIZE,
            shapes[f"{attention}.k_proj.weight"][0] // HEAD_SIZE,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise NotThisArchitecture(f"the text encoder is no Ministral 3: {error}") from error


def unread_reason(name: str) -> str | None:
    """Return why a tensor of the text encoder may be left over, None if it may not. ``name``: without prefix."""
    return "behind the hidden layer that is read, or for images" if _UNREAD.match(name) else None


def folder_settings(role: str) -> Iterable[tuple[str, str, object]]:
    """Yield what ``config.json`` says; see :attr:`safelight.families.family.Family.folder_settings`."""
    yield role, "text_config.rms_norm_eps", NORM_EPSILON
    yield role, "text_config.hidden_act", "silu"
    yield role, "text_config.head_dim", HEAD_SIZE
    yield role, "text_config.sliding_window", None
    for name in ("rope_theta", "factor", "original_max_position_embeddings", "llama_4_scaling_beta", "rope_type"):
        yield role, f"text_config.rope_parameters.{name}", ROPE[name]
