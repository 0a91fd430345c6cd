"""What text encoders make of token ids."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection


def encode(module: nn.Module, ids: torch.Tensor, skip: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden states, pooled output) of a text encoder for token ``ids``, int64 (1, positions).

    ``skip`` None: the output after the last layer and its norm. An encoder with a projection (SDXL's second) gives the
    hidden states ``skip + 2`` from the end, without a norm, as SDXL was trained; pooled output is None without one.
    """
    encoder = cast("Any", module)
    out = encoder(ids, output_hidden_states=True)
    if isinstance(module, CLIPTextModelWithProjection):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None


def final_norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The norm behind a text encoder's last layer, for CLIP skip."""
    return cast("Any", module).final_layer_norm(hidden)
