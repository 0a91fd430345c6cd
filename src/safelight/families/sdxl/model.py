"""What Stable Diffusion XL computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.families.family_model import Call, PromptText, Tensors
from safelight.families.sd import encoding
from safelight.families.sd.encoding import EncoderOutput
from safelight.families.sd.model import StableDiffusion
from safelight.families.sd.spec import LATENT_SCALE
from safelight.request.prompts.tokens import END


class StableDiffusionXL(StableDiffusion):
    """Adds a second text encoder with a pooled output, and the image's size as conditioning."""

    def pools(self, role: str) -> bool:
        return role == "text_encoder_2"

    def choose_layer(self, role: str, module: nn.Module, out: Any, clip_skip: int) -> EncoderOutput:
        # SDXL always skips one layer and applies no norm (Podell et al. 2023).
        return encoding.layer(module, out, clip_skip + 1 if role == "text_encoder" else clip_skip)

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        first, second = encoded["text_encoder"][text], encoded["text_encoder_2"][text]
        hidden, pooled = torch.cat([first["hidden"], second["hidden"]], dim=-1), second["pooled"]
        if text == ("negative", ""):
            # SDXL was trained with zeros in place of an empty prompt.
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        return {"hidden": hidden, "pooled": pooled}

    def added_cond_kwargs(self, call: Call) -> dict[str, torch.Tensor] | None:
        height, width = (side * LATENT_SCALE for side in call.latents.shape[-2:])
        hidden = call.condition["hidden"]
        # The original size, the crop's corner, and the target size, in pixels.
        numbers = torch.tensor([[height, width, 0, 0, height, width]], dtype=hidden.dtype).to(hidden.device)
        return {"text_embeds": call.condition["pooled"], "time_ids": numbers.repeat(len(call.latents), 1)}


MODEL = StableDiffusionXL(
    heads={},
    sizes={"sdxl": 128},
    pads={("sdxl", "text_encoder"): END, ("sdxl", "text_encoder_2"): 0},
)
