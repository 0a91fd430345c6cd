"""Builds CLIP text encoders."""

from __future__ import annotations

import torch
from torch import nn

from safelight.boundary import modules
from safelight.families.parts.clip import CLIPConfig
from safelight.request.prompts.tokens import END, START

CHANNELS_PER_HEAD = 64


def build(config: CLIPConfig, attention: str) -> nn.Module:
    """Build a CLIP text encoder on the current default device. ``attention``: name of the attention kernel."""
    settings = modules.CLIP_CONFIG(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        projection_dim=config.projection or config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.width // CHANNELS_PER_HEAD),
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        # transformers has two of these kernels. Slicing is not needed for 77 tokens.
        attn_implementation="eager" if attention in ("normal", "sliced") else "sdpa",
    )
    return modules.clip(settings) if config.projection is None else modules.CLIP_WITH_PROJECTION(settings)


def run_lazy_init(module: nn.Module) -> None:
    """Call a CLIP text encoder once on meta: transformers installs hooks at the first call. Ignore other modules."""
    if modules.is_clip(module):
        module(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)
