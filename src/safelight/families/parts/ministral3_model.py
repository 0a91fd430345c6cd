"""Computes Ministral 3 as a text encoder: its module, its tokens, its hidden states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.family_model import PromptText, TextInput, TextInputs
from safelight.families.parts.ministral3 import HEAD_SIZE, NORM_EPSILON, POSITIONS, ROPE, Ministral3Config
from safelight.families.parts.tokenizer import check, load
from safelight.families.tokenizer_file import TokenizerContent

BEGIN = "<s>"
"""The token that a text without tokens is replaced by."""

ROPE_FUNCTIONS = "transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS"


def text_inputs(content: TokenizerContent, texts: Sequence[PromptText]) -> TextInputs:
    """Tokenize prompts, with the tokens that the tokenizer adds."""
    tokenizer = load(None, content)
    inputs: dict[PromptText, TextInput] = {}
    for pair in texts:
        ids = tokenizer.encode(pair.text).ids or [tokenizer.token_to_id(BEGIN) or 0]
        inputs[pair] = TextInput(ids, json.dumps(ids))
    return TextInputs(inputs)


def build(config: Ministral3Config) -> nn.Module:
    """Build the module on the current default device. It returns the last hidden layer without the final norm."""
    settings = modules.library_class("transformers.models.ministral3.configuration_ministral3:Ministral3Config")(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters=dict(ROPE),
        attn_implementation="sdpa",
    )
    module = modules.library_class("transformers.models.ministral3.modeling_ministral3:Ministral3Model")(settings)
    module.norm = nn.Identity()
    return module


def frequencies(config: Any) -> torch.Tensor:
    """Return the frequencies of the rotary embedding, fp32, on the CPU. ``config``: transformers' settings."""
    return modules.library_class(ROPE_FUNCTIONS)["yarn"](config, device=torch.device("cpu"))[0]


def hidden_states(module: nn.Module, ids: list[int], device: torch.device) -> torch.Tensor:
    """Return the hidden states (1, tokens, width)."""
    check(ids, cast("Any", module).config.vocab_size, "embed_tokens.weight")
    return cast("Any", module)(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
