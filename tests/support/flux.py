"""Tiny random FLUX.1 checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from support.oracle import tokenizer as clip_tokenizer
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from safelight.families.components import Config
from safelight.families.flux.transformer import FluxConfig
from safelight.families.parts import t5
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig

_SHIFTED = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dev", "kontext", "fill"), _SHIFTED),
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
}
"""The scheduler settings that FLUX.1 publishes."""

PIPELINES: dict[str, Any] = {
    "dev": diffusers.FluxPipeline,
    "schnell": diffusers.FluxPipeline,
    "kontext": diffusers.FluxKontextPipeline,
    "fill": diffusers.FluxFillPipeline,
}

INPUTS = {"fill": 384}
"""Values per token that a variant's transformer reads; 64 for the others."""


def configs(variant: str = "dev") -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": CLIPConfig(64, 64, 2, 49408, 77, None, "quick_gelu"),
        "text_encoder_2": T5Config(32128, 32, 64, 2, 2, 16),
        "transformer": FluxConfig(INPUTS.get(variant, 64), 16, 64, 2, 2, 32, 32, 64, guidance=variant != "schnell"),
        "vae": VAEConfig(3, 3, 16, (32, 32, 32, 32), 1, quantised=False),
    }


def modules(seed: int = 0, variant: str = "dev") -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights."""
    generator = torch.Generator().manual_seed(seed)
    return {role: random_module("flux", config, generator) for role, config in configs(variant).items()}


@cache
def t5_tokenizer() -> Any:
    """T5's tokenizer as transformers loads it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(gzip.decompress(t5.SHIPPED.path.read_bytes()))
        file.flush()
        return PreTrainedTokenizerFast(
            tokenizer_file=file.name, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
        )


def _pipeline(built: dict[str, Any], scheduler: Any, variant: str) -> Any:
    tokenizers = {"tokenizer": clip_tokenizer("<|endoftext|>"), "tokenizer_2": t5_tokenizer()}
    return PIPELINES[variant](**built, **tokenizers, scheduler=scheduler)


def pipeline(seed: int, variant: str = "dev", **settings: Any) -> Any:
    built = {role: aligned(module) for role, module in modules(seed, variant).items()}
    return _pipeline(built, diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[variant], **settings), variant)


def loaded(path: Path, dtype: torch.dtype, variant: str = "dev") -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "transformer": diffusers.FluxTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
    }
    built = {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    return _pipeline(built, scheduler, variant)


def write_folder(path: Path, seed: int, variant: str = "dev", **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {"_class_name": PIPELINES[variant].__name__, "scheduler": scheduler}
    for role, module in modules(seed, variant).items():
        module.save_pretrained(path / role, **save)  # type: ignore[operator]
        index[role] = ["transformers" if role.startswith("text_encoder") else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULERS[variant]))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def original_names(module: nn.Module, variant: str = "dev") -> dict[str, torch.Tensor]:
    """The transformer's tensors under their original names, fused, and with the last layer's halves swapped."""
    return last_names(module, configs(variant)["transformer"])


def last_names(module: nn.Module, config: Config) -> dict[str, torch.Tensor]:
    """A module's tensors under the last name that the table has for each."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for row in config.rows():
        source, tensor = row.sources[-1], state[row.name].clone()
        if source.swap_halves:
            out[source.name] = torch.cat(tensor.chunk(2)[::-1])
        elif source.in_order:
            out[source.name] = tensor
        else:
            fused.setdefault(source.name, []).append((source.part(len(tensor))[0], tensor))
    parts = {name: [tensor for _, tensor in sorted(some, key=lambda one: one[0])] for name, some in fused.items()}
    return out | {name: torch.cat(some) for name, some in parts.items()}


def ldm_vae(module: nn.Module) -> dict[str, torch.Tensor]:
    """The VAE's tensors under LDM's names."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    for row in configs()["vae"].rows():
        source, tensor = row.sources[min(1, len(row.sources) - 1)], state[row.name].clone()
        square = ".mid.attn_1." in source.name and tensor.ndim == 2
        out[source.name] = tensor[:, :, None, None] if square else tensor
    return out


def parts(seed: int, variant: str = "dev") -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each component under the names that files of its own have."""
    built = modules(seed, variant)
    t5 = {name: tensor.clone() for name, tensor in built["text_encoder_2"].state_dict().items()}
    clip = {f"text_model.{name}": tensor.clone() for name, tensor in built["text_encoder"].state_dict().items()}
    return {
        "text_encoder": clip | {"text_projection.weight": torch.eye(64), "logit_scale": torch.tensor(4.6)},
        "text_encoder_2": t5,
        "transformer": original_names(built["transformer"], variant),
        "vae": ldm_vae(built["vae"]),
    }


PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}


def single_tensors(seed: int, variant: str = "dev") -> dict[str, torch.Tensor]:
    """All tensors of a model under the names of a single file."""
    return {PREFIXES[role] + name: one for role, some in parts(seed, variant).items() for name, one in some.items()}


def write_single(path: Path, seed: int, variant: str = "dev") -> Path:
    """Write a single file with the original names."""
    save_file(single_tensors(seed, variant), path)
    return path
