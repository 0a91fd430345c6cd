"""Tiny random Z-Image checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from support.checkpoints import random_module
from support.oracle import aligned
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm

from safelight.families.family import Config
from safelight.families.parts import qwen3_model
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.vae import VAEConfig
from safelight.families.zimage.transformer import ZImageConfig

TEMPLATE = Path(__file__).parents[1] / "data/qwen3_chat_template.jinja"
VOCABULARY = 151936
LAYERS = 3
"""Layers of the text encoder in files; Safelight computes one less."""

SHIFTS = {"turbo": 3.0, "base": 6.0}


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Qwen3Config(VOCABULARY, 32, 64, LAYERS, 2, 1, 16),
        "transformer": ZImageConfig(16, 64, 2, 1, 32, 32),
        "vae": VAEConfig(3, 3, 16, (32, 32, 32, 32), 1, quantised=False),
    }


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights. The text encoder has all layers."""
    generator = torch.Generator().manual_seed(seed)
    built = {role: random_module("z-image", config, generator) for role, config in configs().items()}
    encoder: Any = built["text_encoder"]
    encoder.norm = Qwen3RMSNorm(32).requires_grad_(False)
    encoder.norm.weight.normal_(1, 0.05, generator=generator)
    return built


def tokenizer() -> Any:
    """Qwen3's tokenizer as transformers loads it, with the published chat template."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(gzip.decompress(qwen3_model.TOKENIZER.read_bytes()))
        file.flush()
        made = PreTrainedTokenizerFast(
            tokenizer_file=file.name, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right"
        )
    made.chat_template = TEMPLATE.read_text()
    return made


def pipeline(seed: int, variant: str = "turbo") -> Any:
    built: dict[str, Any] = {role: aligned(module) for role, module in modules(seed).items()}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFTS[variant])
    return diffusers.ZImagePipeline(**built, tokenizer=tokenizer(), scheduler=scheduler)


def loaded(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component: some buffers stay in fp32."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen3Model,
        "transformer": diffusers.ZImageTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
    }
    built = {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    return diffusers.ZImagePipeline(**built, tokenizer=tokenizer(), scheduler=scheduler)


def write_folder(path: Path, seed: int, variant: str = "turbo", **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {"_class_name": "ZImagePipeline", "scheduler": scheduler}
    for role, module in modules(seed).items():
        module.save_pretrained(path / role, **save)  # type: ignore[operator]
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": SHIFTS[variant]}))
    (path / "model_index.json").write_text(json.dumps(index))
    return path
