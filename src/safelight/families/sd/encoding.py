"""Encodes token ids with CLIP text encoders."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from safelight.boundary.modules import is_projected_clip

Read = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (1, positions, width), and the pooled output (1, width) or None."""


def read(module: nn.Module, ids: torch.Tensor, clip_skip: int, mask: torch.Tensor | None = None) -> Read:
    """Run the text encoder of SD 1 or 2. With clip skip, the final norm is applied to the chosen layer, as in A1111.

    ``ids``: token ids, int64, (1, positions).
    ``mask``: which ids count, None for all.
    """
    if clip_skip:
        hidden = skipping(module, ids, clip_skip, mask)[0]
        return cast("Any", module).final_layer_norm(hidden), None
    return skipping(module, ids, None, mask)


def skipping(module: nn.Module, ids: torch.Tensor, skip: int | None, mask: torch.Tensor | None) -> Read:
    """Run a text encoder and choose its layer.

    ``skip``: layers to skip; None for the output after the last layer and its norm.

    An encoder with a projection (SDXL's second) returns the hidden states at ``skip + 2`` from the end, without a norm,
    and the pooled output. For other encoders the pooled output is None.
    """
    encoder = cast("Any", module)
    out = encoder(ids, attention_mask=mask, output_hidden_states=True)
    if is_projected_clip(module):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None
