"""From prompts to the embeddings that a base's UNet reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from safelight.arch import diffusers_fence
from safelight.formats.layout import BASES
from safelight.prompts.tokens import POSITIONS, token_ids
from safelight.types import Request


def encode_role(
    base: str, role: str, encoder: nn.Module, texts: tuple[str, ...], clip_skip: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """For each text: hidden states (1, 77, width) and the pooled output (1, width) or None, of one text encoder.

    SD 1 and SD 2 skip with the final norm behind the layer (as A1111 and InvokeAI do); SDXL always leaves one layer out
    and has no norm behind it (Podell et al. 2023).
    """
    out: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for text in texts:
        ids = torch.tensor([token_ids(text, BASES[base].pad_ids[role])[0]], device=device)
        if base == "sdxl" and role == "text_encoder":
            out.append(diffusers_fence.encode(encoder, ids, clip_skip + 1))
        elif base == "sdxl":
            out.append(diffusers_fence.encode(encoder, ids, clip_skip))
        elif clip_skip:
            hidden, _ = diffusers_fence.encode(encoder, ids, clip_skip)
            out.append((diffusers_fence.final_norm(encoder, hidden), None))
        else:
            out.append(diffusers_fence.encode(encoder, ids, None))
    return out


def cut_off(base: str, request: Request) -> tuple[str, ...]:
    """A sentence for each prompt that is longer than the text encoders read: what is behind has no effect."""
    pad = next(iter(BASES[base].pad_ids.values()))
    return tuple(
        f"the {name} is {lost} tokens longer than the {POSITIONS - 2} that the model reads; its end has no effect"
        for name, text in (("prompt", request.prompt), ("negative prompt", request.negative))
        if (lost := token_ids(text, pad)[1])
    )


def assemble(
    base: str, encoded: Mapping[str, list[tuple[torch.Tensor, torch.Tensor | None]]], empty_negative: bool
) -> dict[str, torch.Tensor]:
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
