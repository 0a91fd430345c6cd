"""Chooses which layer of a CLIP text encoder is read."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from safelight.boundary.modules import is_projected_clip

EncoderOutput = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (1, positions, width), and the pooled output (1, width) or None."""


def normed_layer(module: nn.Module, out: Any, clip_skip: int) -> EncoderOutput:
    """Choose the layer of SD 1 or 2. With clip skip, the final norm is applied to it, as in A1111.

    ``out``: what the encoder returned, with all hidden states.
    """
    if clip_skip:
        return cast("Any", module).final_layer_norm(layer(module, out, clip_skip)[0]), None
    return layer(module, out, None)


def layer(module: nn.Module, out: Any, skip: int | None) -> EncoderOutput:
    """Choose a layer.

    ``skip``: layers to skip; None for the output after the last layer and its norm.

    An encoder with a projection (SDXL's second) returns the hidden states at ``skip + 2`` from the end, without a norm,
    and the pooled output. For other encoders the pooled output is None.
    """
    if is_projected_clip(module):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None
