"""Tiny random Krea 2 checkpoints, and diffusers' own pipeline with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from support.zimage import VOCABULARY, tokenizer
from torch import nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig as LibraryConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from safelight.families.components import Config
from safelight.families.krea2.transformer import Krea2Config
from safelight.families.parts.qwen3_vl import Qwen3VLConfig
from safelight.families.parts.qwen_vae import QwenVAEConfig

LAYERS = 6
"""Layers of the text encoder in files; Safelight has one less, and the transformer reads the second and the fifth."""

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 6400,
}

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Qwen3VLConfig(VOCABULARY, 32, 32, LAYERS, 2, 1, 16),
        "transformer": Krea2Config(16, 64, 2, 32, 1, 96, 32, 32, 2, 16, 1, 48, 1, 1),
        "vae": QwenVAEConfig(3, 16, 8, (1, 2, 2, 2), 1),
    }


@cache
def modules(seed: int = 0) -> Mapping[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them.

    They are built once for all tests, so no test may change them.
    """
    generator = torch.Generator().manual_seed(seed)
    built: dict[str, Any] = {role: random_module("krea-2", config, generator) for role, config in configs().items()}
    inner = built["text_encoder"]
    kind: Any = LibraryConfig
    settings = kind(text_config=inner.config.to_dict(), vision_config=VISION, attn_implementation="sdpa")
    encoder = Qwen3VLModel(settings).eval().requires_grad_(False)
    encoder.language_model.load_state_dict(inner.state_dict(), strict=False)
    built["text_encoder"] = encoder
    plain: dict[str, Any] = {name: one for name, one in built["vae"].config.items() if not name.startswith("_")}
    plain["temperal_downsample"] = [False, True, True]
    vae = diffusers.AutoencoderKLQwenImage(**plain)
    vae.eval().requires_grad_(False).load_state_dict(built["vae"].state_dict(), strict=False)
    built["vae"] = vae
    return built


def pipeline_of(built: Mapping[str, Any], distilled: bool) -> Any:
    """Return the pipeline of some components."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    parts = {**built, "tokenizer": tokenizer(), "scheduler": scheduler}
    return diffusers.Krea2Pipeline(**parts, is_distilled=distilled, text_encoder_select_layers=(2, 5))


def pipeline(seed: int, distilled: bool) -> Any:
    """Return the pipeline with the modules of :func:`modules`."""
    return pipeline_of({role: aligned(module) for role, module in modules(seed).items()}, distilled)


def loaded(path: Path, distilled: bool, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component: the transformer's norms stay in fp32."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen3VLModel,
        "transformer": diffusers.Krea2Transformer2DModel,
        "vae": diffusers.AutoencoderKLQwenImage,
    }
    built = {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    return pipeline_of(built, distilled)


def write_folder(path: Path, seed: int, distilled: bool, shard: str = "1GB") -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component.

    ``shard``: the most bytes of a file of the transformer.
    """
    index: dict[str, Any] = {
        "_class_name": "Krea2Pipeline",
        "is_distilled": distilled,
        "patch_size": 2,
        "text_encoder_select_layers": [2, 5],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    for role, module in modules(seed).items():
        more = {"max_shard_size": shard} if role == "transformer" else {}
        module.save_pretrained(path / role, **more)  # type: ignore[operator]
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def as_turbo(raw: Path, path: Path) -> Path:
    """Copy the folder of a Raw, and call it a Turbo."""
    shutil.copytree(raw, path)
    index = path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    return path


def original_names(role: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """A component's tensors under their original names. What it has beside them keeps its name."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    for row in configs()[role].rows():
        tensor, source = state.pop(row.name).clone(), row.sources[-1]
        out[source.name] = tensor.flatten() if source.name.endswith(".mod.lin") else tensor
    return out | state


def text_file(encoder: nn.Module, comfy: bool) -> dict[str, torch.Tensor]:
    """The text encoder's tensors as ComfyUI's files name them, or as those of the whole language model do."""
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if comfy:
        return {name.replace("language_model.", "model."): tensor for name, tensor in state.items()}
    head = state["language_model.embed_tokens.weight"].clone()
    return {**{f"model.{name}": tensor for name, tensor in state.items()}, "lm_head.weight": head}


def write_files(folder: Path, seed: int, prefix: str = "model.diffusion_model.", comfy: bool = True) -> Path:
    """Write a folder as ComfyUI has it: the transformer, the text encoder and the VAE in a file each."""
    built = modules(seed)
    net = original_names("transformer", built["transformer"])
    files = {
        "diffusion_models/krea2_tiny.safetensors": {prefix + name: tensor for name, tensor in net.items()},
        "text_encoders/qwen3vl_tiny.safetensors": text_file(built["text_encoder"], comfy),
        "vae/qwen_image_vae.safetensors": original_names("vae", built["vae"]),
    }
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({one: tensor.contiguous() for one, tensor in tensors.items()}, folder / name)
    return folder
