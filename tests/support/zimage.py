"""Tiny random Z-Image checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from safelight.families.components import Config
from safelight.families.parts import qwen3
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


@cache
def tokenizer() -> Any:
    """Qwen3's tokenizer as transformers loads it, with the published chat template."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(gzip.decompress(qwen3.SHIPPED.path.read_bytes()))
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
    built: dict[str, Any] = {
        role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()
    }
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


def original_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The transformer's tensors under their original names: the three projections of an attention are one tensor."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, list[torch.Tensor]] = {}
    for row in configs()["transformer"].rows():
        source = row.sources[-1]
        if source.chunk is None:
            out[source.name] = state[row.name].clone()
        else:
            fused.setdefault(source.name, []).append(state[row.name])
    return out | {name: torch.cat(parts) for name, parts in fused.items()}


def write_files(folder: Path, seed: int, prefix: str = "model.diffusion_model.", text_prefix: str = "model.") -> Path:
    """Write a folder as ComfyUI has it: the transformer, the text encoder and the VAE in a file each."""
    built = modules(seed)
    vae = ldm_vae(built["vae"])
    files = {
        "diffusion_models/z_image_tiny.safetensors": {
            prefix + name: tensor for name, tensor in original_names(built["transformer"]).items()
        },
        "text_encoders/qwen_3_tiny.safetensors": {
            text_prefix + name: tensor.clone() for name, tensor in built["text_encoder"].state_dict().items()
        },
        "vae/ae_tiny.safetensors": vae,
    }
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name)
    return folder


def ldm_vae(module: nn.Module) -> dict[str, torch.Tensor]:
    """The VAE's tensors under LDM's names."""
    state = module.state_dict()
    out: dict[str, torch.Tensor] = {}
    for row in configs()["vae"].rows():
        source, tensor = row.sources[min(1, len(row.sources) - 1)], state[row.name].clone()
        square = ".mid.attn_1." in source.name and tensor.ndim == 2
        out[source.name] = tensor[:, :, None, None] if square else tensor
    return out


@contextmanager
def changed_weights(folder: Path) -> Generator[dict[str, torch.Tensor]]:
    """Within the context, a component's tensors may be changed in place; then its file is written again."""
    [file] = folder.glob("*.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield weights
    save_file(weights, file, {"format": "pt"})
