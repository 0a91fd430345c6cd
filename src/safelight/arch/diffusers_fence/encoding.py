"""Encodes token ids with text encoders."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection


def read(
    module: nn.Module, role: str, base: str, ids: torch.Tensor, clip_skip: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a text encoder. Returns the hidden states for the base's UNet, and the pooled output or None.

    ``ids``: token ids, int64, (1, positions).
    ``mask``: which ids count, None for all.

    With clip skip, SD 1 and SD 2 apply the final norm to the chosen layer (as A1111 and InvokeAI do). SDXL always skips
    one layer and applies no norm (Podell et al. 2023).
    """
    if base == "sdxl" and role == "text_encoder":
        return _encode(module, ids, clip_skip + 1, mask)
    if base == "sdxl":
        return _encode(module, ids, clip_skip, mask)
    if clip_skip:
        hidden = _encode(module, ids, clip_skip, mask)[0]
        return cast("Any", module).final_layer_norm(hidden), None
    return _encode(module, ids, None, mask)


def _encode(
    module: nn.Module, ids: torch.Tensor, skip: int | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the encoder and choose its layer.

    ``skip``: layers to skip; None for the output after the last layer and its norm.

    An encoder with a projection (SDXL's second) returns the hidden states at ``skip + 2`` from the end, without a norm,
    and the pooled output. For other encoders the pooled output is None.
    """
    encoder = cast("Any", module)
    out = encoder(ids, attention_mask=mask, output_hidden_states=True)
    if isinstance(module, CLIPTextModelWithProjection):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None
