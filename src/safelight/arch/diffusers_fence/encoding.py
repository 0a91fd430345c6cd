"""What text encoders make of token ids."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection


def read(
    module: nn.Module, role: str, base: str, ids: torch.Tensor, clip_skip: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden states as the base's UNet reads them, pooled output) of a text encoder for token ``ids``, int64
    (1, positions); ``mask``: which of them count, None for all.

    SD 1 and SD 2 skip with the final norm behind the layer (as A1111 and InvokeAI do); SDXL always leaves one layer out
    and has no norm behind it (Podell et al. 2023).
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
    """``skip`` None: the output after the last layer and its norm. An encoder with a projection (SDXL's second) gives
    the hidden states ``skip + 2`` from the end, without a norm; pooled output is None without one."""
    encoder = cast("Any", module)
    out = encoder(ids, attention_mask=mask, output_hidden_states=True)
    if isinstance(module, CLIPTextModelWithProjection):
        return out.hidden_states[-((skip or 0) + 2)], out.text_embeds
    if skip is None:
        return out.last_hidden_state, None
    return out.hidden_states[-(skip + 1)], None
