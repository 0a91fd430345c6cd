"""Computes the language model of Qwen3-VL as a text encoder: its module and its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.parts import qwen3_model
from safelight.families.parts.qwen3_vl import Qwen3VLConfig

ROPE_THETA = 5e6
POSITIONS = 262144

MROPE_SECTION = (24, 20, 20)
"""How many frequencies turn with each axis of a picture's position. For text, all axes have the same position."""


def build(config: Qwen3VLConfig) -> nn.Module:
    """Build the module on the current default device, without the final norm."""
    settings = modules.library_class("transformers.models.qwen3_vl.configuration_qwen3_vl:Qwen3VLTextConfig")(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=qwen3_model.NORM_EPSILON,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "mrope_section": list(MROPE_SECTION),
            "mrope_interleaved": True,
        },
        attn_implementation="sdpa",
    )
    module = modules.library_class("transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextModel")(settings)
    module.norm = nn.Identity()
    return module


def frequencies(config: object) -> torch.Tensor:
    """Return the frequencies of the rotary embedding, fp32, on the CPU. ``config``: transformers' settings."""
    return qwen3_model.frequencies(config, ROPE_THETA)


def states_at(module: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """Return the hidden states (1, n, width) after some layers, as :func:`qwen3_model.states_at`.

    A token that ``mask`` hides takes no position: the tokens after it have the positions that they have without it.
    """
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return qwen3_model.states_at(module, tokens, mask, positions.expand(3, -1, -1), layers)
