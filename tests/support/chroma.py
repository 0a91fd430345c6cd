"""Tiny random Chroma checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.checkpoints import random_module
from support.flux import last_names, ldm_vae, t5_tokenizer
from support.libraries import diffusers
from support.oracle import aligned
from torch import nn
from transformers.models.t5.modeling_t5 import T5EncoderModel

from safelight.families.chroma.transformer import ChromaConfig
from safelight.families.components import Config
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig

SCHEDULERS: dict[str, dict[str, Any]] = {
    "hd": {"shift": 3.0, "use_dynamic_shifting": False},
    "flash": {"shift": 1.0, "use_dynamic_shifting": False},
    "base": {"use_beta_sigmas": True},
    "unlocked": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}
"""The scheduler settings that the variants publish."""


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": T5Config(32128, 32, 64, 2, 2, 16),
        "transformer": ChromaConfig(64, 16, 64, 2, 2, 32, 32, 16, 32, 2),
        "vae": VAEConfig(3, 3, 16, (32, 32, 32, 32), 1, quantised=False),
    }


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights."""
    generator = torch.Generator().manual_seed(seed)
    return {role: random_module("chroma", config, generator) for role, config in configs().items()}


def scheduler(variant: str, **settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{**SCHEDULERS[variant], **settings})


def pipeline(seed: int, variant: str = "hd", **settings: Any) -> Any:
    built: dict[str, Any] = {role: aligned(module) for role, module in modules(seed).items()}
    return diffusers.ChromaPipeline(**built, tokenizer=t5_tokenizer(), scheduler=scheduler(variant, **settings))


def loaded(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": T5EncoderModel,
        "transformer": diffusers.ChromaTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
    }
    built: dict[str, Any] = {
        role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()
    }
    found: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    return diffusers.ChromaPipeline(**built, tokenizer=t5_tokenizer(), scheduler=found)


def write_folder(path: Path, seed: int, variant: str = "hd", **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    names = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {"_class_name": "ChromaPipeline", "scheduler": names}
    for role, module in modules(seed).items():
        module.save_pretrained(path / role, **save)  # type: ignore[operator]
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULERS[variant]))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def as_variant(folder: Path, variant: str) -> Path:
    """Copy a folder, with the scheduler's settings of another variant."""
    copy = shutil.copytree(folder, folder.with_name(variant))
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULERS[variant]))
    return copy


def original_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The transformer's tensors under their original names, fused."""
    return last_names(module, configs()["transformer"])


def parts(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each component under the names that files of its own have."""
    built = modules(seed)
    return {
        "text_encoder": {name: tensor.clone() for name, tensor in built["text_encoder"].state_dict().items()},
        "transformer": original_names(built["transformer"]),
        "vae": ldm_vae(built["vae"]),
    }


PREFIXES = {
    "text_encoder": "text_encoders.t5xxl.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}


def single_tensors(seed: int) -> dict[str, torch.Tensor]:
    """All tensors of a model under the names of a single file."""
    return {PREFIXES[role] + name: one for role, some in parts(seed).items() for name, one in some.items()}


def write_single(path: Path, seed: int) -> Path:
    """Write a single file with the original names."""
    save_file(single_tensors(seed), path)
    return path
