"""Computes T5's encoder as a text encoder: its module, its tokens, its hidden states."""

from __future__ import annotations

from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from safelight.boundary import modules
from safelight.families.parts.t5 import END, PAD, SAME_EMBEDDINGS, SHIPPED, T5Config
from safelight.families.parts.tokenizer import check, load
from safelight.families.tokenizer_file import TokenizerContent

FARTHEST = 128
"""The distance between two tokens from which all distances have the same bias."""

NORM_EPSILON = 1e-6


def tokenizer(own: TokenizerContent | None = None) -> Tokenizer:
    """Return T5's tokenizer. ``own``: that of the checkpoint; None for Safelight's."""
    return load(SHIPPED, own)


def tokens_of(text: str, length: int, own: TokenizerContent | None = None) -> tuple[list[int], str]:
    """Return ``length`` token ids of a text, and the part of the text that they leave out.

    The ids are those of its tokens, an end token, and padding.
    ``own``: as in :func:`tokenizer`.
    """
    ids, cut = tokens_without_padding(text, length, own)
    return [*ids, *[PAD] * (length - len(ids))], cut


def tokens_without_padding(text: str, most: int, own: TokenizerContent | None = None) -> tuple[list[int], str]:
    """Return the token ids of a text and an end token, at most ``most``, and the part of the text that they leave out.

    ``own``: as in :func:`tokenizer`.
    """
    encoding, last = tokenizer(own).encode(text, add_special_tokens=False), most - 1
    cut = text[encoding.offsets[last][0] :] if len(encoding.ids) > last else ""
    return [*encoding.ids[:last], END], cut


def build(config: T5Config) -> nn.Module:
    """Build the module on the current default device. Its two names of the token embeddings are one module."""
    kind = modules.library_class("transformers.models.t5.modeling_t5:T5EncoderModel")
    settings = modules.library_class("transformers.models.t5.configuration_t5:T5Config")(
        vocab_size=config.vocabulary,
        d_model=config.width,
        d_kv=config.head_size,
        d_ff=config.intermediate,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=FARTHEST,
        layer_norm_epsilon=NORM_EPSILON,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        # Older versions of transformers have only "eager" for T5.
        attn_implementation="sdpa" if getattr(kind, "_supports_sdpa", False) else "eager",
    )
    module = kind(settings)
    module.set_input_embeddings(module.shared)
    return module


def mask_of(ids: list[int], device: torch.device) -> torch.Tensor:
    """Return the mask (1, tokens) of token ids: 1 for the text and its end token, 0 for the padding after it."""
    shown = max(place for place, token in enumerate(ids) if token != PAD) + 1
    return torch.tensor([[1] * shown + [0] * (len(ids) - shown)], device=device)


def hidden_states(
    module: nn.Module, ids: list[int], device: torch.device, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the hidden states (1, tokens, width).

    ``mask``: see :func:`mask_of`; None if the padding is not hidden, as in diffusers' pipelines for FLUX.
    """
    check(ids, cast("Any", module).config.vocab_size, SAME_EMBEDDINGS)
    return cast("Any", module)(torch.tensor([ids], device=device), attention_mask=mask).last_hidden_state
