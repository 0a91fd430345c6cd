"""What SDXL's refiner computes: the last steps of an image, or an image from an image."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from safelight.families.family_model import Call, PromptText, Tensors
from safelight.families.sd.spec import LATENT_SCALE
from safelight.families.sdxl.model import StableDiffusionXL

SCORES: Mapping[str, float] = {"prompt": 6.0, "negative": 2.5}
"""The aesthetic score that the denoiser gets with each prompt: the defaults of diffusers and AUTOMATIC1111."""


class Refiner(StableDiffusionXL):
    """Has only the second text encoder, and an aesthetic score in place of the target size."""

    def condition(self, encoded: Mapping[str, Mapping[PromptText, Tensors]], text: PromptText) -> Tensors:
        found = encoded["text_encoder_2"][text]
        score = torch.full((1, 1), SCORES[text.field], dtype=found["hidden"].dtype)
        return {**found, "score": score.to(found["hidden"].device)}

    def added_cond_kwargs(self, call: Call) -> dict[str, torch.Tensor] | None:
        height, width = (side * LATENT_SCALE for side in call.latents.shape[-2:])
        score = call.condition["score"]
        # The original size and the crop's corner, in pixels.
        numbers = torch.tensor([[height, width, 0, 0]], dtype=score.dtype).to(score.device)
        time_ids = torch.cat([numbers.repeat(len(call.latents), 1), score], dim=1)
        return {"text_embeds": call.condition["pooled"], "time_ids": time_ids}


MODEL = Refiner(heads={}, sizes={"sdxl-refiner": 128}, pads={("sdxl-refiner", "text_encoder_2"): 0})
