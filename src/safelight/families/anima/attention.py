"""The attention of Anima's transformer, with a choice of the kernel. diffusers' own processor has none."""

from __future__ import annotations

from typing import Any

import torch

from safelight.boundary import modules

DISPATCH = "diffusers.models.attention_dispatch:dispatch_attention_fn"
ROTATE = "diffusers.models.embeddings:apply_rotary_emb"


class CosmosProcessor:
    """Computes what diffusers' ``CosmosAttnProcessor2_0`` does, for as many heads of keys as of queries.

    The attributes have the names of diffusers' processors that let the kernel be chosen.
    """

    _attention_backend: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                modules.library_class(ROTATE)(one, image_rotary_emb, use_real=True, use_real_unbind_dim=-2)
                for one in (query, key)
            )
        found = modules.library_class(DISPATCH)(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attention_mask,
            backend=self._attention_backend,
        )
        return attn.to_out[1](attn.to_out[0](found.flatten(2, 3).type_as(query)))
