"""diffusers' own pipelines, unchanged, with the same weights. The tests compare Safelight's pixels with theirs."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support import checkpoints
from support.libraries import diffusers
from torch import nn

from safelight.boundary import exports
from safelight.request.prompts.tokens import VOCABULARY

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""The scheduler settings that Stable Diffusion publishes."""


@cache
def tokenizer(pad: str) -> Any:
    """Return CLIP's tokenizer. All pipelines of a test process share it: building it takes longer than most images."""
    return exports.clip_tokenizer(Path(VOCABULARY), pad)


def own_tokenizers(pipe: Any) -> None:
    """Give a pipeline tokenizers that no other pipeline has, so that it may add tokens."""
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, name):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))


def aligned(module: nn.Module) -> nn.Module:
    """Move every tensor of the module to an address that is a multiple of 64 bytes: fp32 results depend on it."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
        assert parameter.data_ptr() % 64 == 0
    return module


def pipeline(base: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    built: dict[str, Any] = {
        role: aligned(module.to(dtype)) for role, module in checkpoints.modules(base, seed).items()
    }
    scheduler: Any = diffusers.EulerDiscreteScheduler.from_config(SCHEDULE)
    end = "<|endoftext|>"
    if base == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **built, tokenizer=tokenizer(end), tokenizer_2=tokenizer("!"), scheduler=scheduler, add_watermarker=False
        )
    plain: Any = diffusers.StableDiffusionPipeline
    return plain(
        **built,
        tokenizer=tokenizer("!" if base == "sd2" else end),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixels(pipe: Any, prompt: str, negative: str | None, steps: int, seed: int, cfg: float, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        prompt,
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=torch.Generator("cpu").manual_seed(seed),
        **{"width": 64, "height": 64, **call},
    ).images[0]
    return image.tobytes()


class EncoderForCompel:
    """A text encoder as compel 2.5.1 expects it: transformers 5 has no ``text_model`` any more."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.text_model = getattr(module, "text_model", module)
        self.device, self.dtype = module.device, module.dtype

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return self._module(*arguments, **more)


def refiner(seed: int) -> Any:
    """diffusers' pipeline for the refiner of SDXL, with the settings of its published ``model_index.json``."""
    built: dict[str, Any] = {
        role: aligned(module) for role, module in checkpoints.modules("sdxl-refiner", seed).items()
    }
    absent: Any = None
    scheduler: Any = diffusers.EulerDiscreteScheduler.from_config(SCHEDULE)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **built,
        text_encoder=absent,
        tokenizer=absent,
        tokenizer_2=tokenizer("!"),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
