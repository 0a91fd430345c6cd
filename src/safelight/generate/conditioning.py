"""From prompts to the embeddings that a base's UNet reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from safelight.arch.diffusers_fence import encoding
from safelight.formats.layout import BASES
from safelight.prompts.tokens import Chunk, chunks
from safelight.types import Request

Encoded = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states (1, 77 times chunks, width), and the pooled output (1, width) or None."""


def prompts_of(base: str, role: str, request: Request) -> tuple[list[Chunk], list[Chunk]]:
    """The prompt's and the negative prompt's chunks for a text encoder, as many of one as of the other.

    Raises RequestError for what cannot be parsed.
    """
    pad = BASES[base].pad_ids[role]
    both = chunks("prompt", request.prompt, pad), chunks("negative", request.negative, pad)
    empty = chunks("prompt", "", pad)
    most = max(len(one) for one in both)
    prompt, negative = (one + empty * (most - len(one)) for one in both)
    return prompt, negative


def encode_role(
    base: str, role: str, encoder: nn.Module, prompts: Sequence[Sequence[Chunk]], clip_skip: int, device: torch.device
) -> list[Encoded]:
    """What one text encoder makes of each prompt: its chunks one behind another, pooled as the first is."""
    out: list[Encoded] = []
    for prompt in prompts:
        read = [_encode_chunk(base, role, encoder, chunk, clip_skip, device) for chunk in prompt]
        out.append((torch.cat([hidden for hidden, _ in read], dim=1) if len(read) > 1 else read[0][0], read[0][1]))
    return out


def _encode_chunk(
    base: str, role: str, encoder: nn.Module, chunk: Chunk, clip_skip: int, device: torch.device
) -> Encoded:
    """SD 1 and SD 2 skip with the final norm behind the layer (as A1111 and InvokeAI do); SDXL always leaves one layer
    out and has no norm behind it (Podell et al. 2023)."""
    ids = torch.tensor([chunk.ids], device=device)
    if base == "sdxl" and role == "text_encoder":
        hidden, pooled = encoding.encode(encoder, ids, clip_skip + 1)
    elif base == "sdxl":
        hidden, pooled = encoding.encode(encoder, ids, clip_skip)
    elif clip_skip:
        skipped, pooled = encoding.encode(encoder, ids, clip_skip)[0], None
        hidden = encoding.final_norm(encoder, skipped)
    else:
        hidden, pooled = encoding.encode(encoder, ids, None)
    return (hidden if chunk.weights is None else _weighted(hidden, chunk.weights)), pooled


def _weighted(hidden: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Each token's state times its weight, the mean of all as it was: AUTOMATIC1111's emphasis."""
    wide = hidden.float()
    scaled = wide * torch.tensor(weights, device=wide.device).view(1, -1, 1)
    return (scaled * (wide.mean() / scaled.mean())).to(hidden.dtype)


def assemble(base: str, encoded: Mapping[str, list[Encoded]], empty_negative: bool) -> dict[str, torch.Tensor]:
    """The pipeline's arguments from what each encoder gave for (prompt, negative prompt).

    SDXL was trained with zeros in place of an empty prompt, so an empty negative prompt becomes zeros.
    """
    if base != "sdxl":
        (prompt, _), (negative, _) = encoded["text_encoder"]
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    first, second = encoded["text_encoder"], encoded["text_encoder_2"]
    prompt = torch.cat([first[0][0], second[0][0]], dim=-1)
    negative = torch.cat([first[1][0], second[1][0]], dim=-1)
    pooled, negative_pooled = second[0][1], second[1][1]
    assert pooled is not None
    assert negative_pooled is not None
    if empty_negative:
        negative, negative_pooled = torch.zeros_like(prompt), torch.zeros_like(pooled)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
