"""Tiny random FLUX.2 klein checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from support.zimage import VOCABULARY, tokenizer
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from safelight.families.components import Config
from safelight.families.flux2.transformer import Flux2Config
from safelight.families.parts.flux2_vae import Flux2VAEConfig
from safelight.families.parts.qwen3 import Qwen3Config

LAYERS = 29
"""Layers of the text encoder in files. Safelight has one less, and computes 27."""

SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Qwen3Config(VOCABULARY, 32, 32, LAYERS, 2, 1, 16),
        "transformer": Flux2Config(128, 64, 2, 2, 32, 96),
        "vae": Flux2VAEConfig(3, 3, 32, (32, 32, 32, 32), 1),
    }


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them."""
    generator = torch.Generator().manual_seed(seed)
    built: dict[str, Any] = {
        role: random_module("flux2-klein", config, generator) for role, config in configs().items()
    }
    inner = built["text_encoder"]
    language = Qwen3ForCausalLM(inner.config).eval().requires_grad_(False)
    language.load_state_dict({f"model.{name}": one for name, one in inner.state_dict().items()}, strict=False)
    built["text_encoder"] = language
    vae = diffusers.AutoencoderKLFlux2(**_settings(built["vae"])).eval().requires_grad_(False)
    vae.load_state_dict({**built["vae"].state_dict(), "bn.num_batches_tracked": torch.tensor(7)})
    built["vae"] = vae
    return built


def _settings(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _pipeline(built: dict[str, Any], distilled: bool) -> Any:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    plain: Any = diffusers.Flux2KleinPipeline
    return plain(**built, tokenizer=tokenizer(), scheduler=scheduler, is_distilled=distilled)


def pipeline(seed: int, distilled: bool) -> Any:
    return _pipeline({role: aligned(module) for role, module in modules(seed).items()}, distilled)


def loaded(path: Path, distilled: bool, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen3ForCausalLM,
        "transformer": diffusers.Flux2Transformer2DModel,
        "vae": diffusers.AutoencoderKLFlux2,
    }
    built = {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    return _pipeline(built, distilled)


def write_folder(path: Path, seed: int, distilled: bool) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": distilled,
        "scheduler": scheduler,
    }
    for role, module in modules(seed).items():
        module.save_pretrained(path / role)  # type: ignore[operator]
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "model_index.json").write_text(json.dumps(index))
    return path
