"""Tiny random Qwen-Image checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from support.checkpoints import random_module
from support.oracle import aligned
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from safelight.families.components import Config
from safelight.families.parts import qwen25_model
from safelight.families.parts.qwen25 import Qwen25Config
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.qwen_image.transformer import QwenImageConfig

VOCABULARY = 152064

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The scheduler settings that Qwen-Image publishes."""

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}
"""The settings of a tiny vision tower."""


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Qwen25Config(VOCABULARY, 32, 64, 6, 2, 1),
        "transformer": QwenImageConfig(64, 16, 64, 2, 32, 32),
        "vae": QwenVAEConfig(3, 16, 8, (1, 2, 4, 4), 1),
    }


def modules(seed: int = 0) -> dict[str, Any]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them.

    The text encoder has its vision tower and its head, the VAE its convolutions over frames.
    """
    generator = torch.Generator().manual_seed(seed)
    built: dict[str, Any] = {role: random_module("qwen-image", config, generator) for role, config in configs().items()}
    built["text_encoder"] = _whole_encoder(built["text_encoder"])
    settings = {name: value for name, value in built["vae"].config.items() if not name.startswith("_")}
    kind: Any = diffusers.AutoencoderKLQwenImage
    vae = kind(**{**settings, "temperal_downsample": [False, True, True]})
    vae.load_state_dict(built["vae"].state_dict(), strict=False)
    built["vae"] = vae.eval().requires_grad_(False)
    return built


def _whole_encoder(language: Any) -> nn.Module:
    kind: Any = Qwen2_5_VLConfig
    settings = kind(text_config=language.config.to_dict(), vision_config=VISION, attn_implementation="sdpa")
    # Small random weights of the vision tower, the same for every seed.
    torch.manual_seed(0)
    whole = Qwen2_5_VLForConditionalGeneration(settings).eval().requires_grad_(False)
    whole.model.language_model.load_state_dict(language.state_dict())
    return whole


@cache
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=qwen25_model.tokenizer(), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def qwen2_tokenizer() -> Any:
    """Qwen2.5's tokenizer as transformers makes it from a vocabulary, merges and added tokens."""
    values = json.loads(qwen25_model.tokenizer().to_str())
    added = {one.pop("id"): AddedToken(**one) for one in values["added_tokens"]}
    kind: Any = Qwen2Tokenizer
    return kind(
        vocab=values["model"]["vocab"],
        merges=[tuple(pair) for pair in values["model"]["merges"]],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        added_tokens_decoder=added,
    )


def _pipeline(built: dict[str, Any]) -> Any:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    return diffusers.QwenImagePipeline(**built, tokenizer=tokenizer(), scheduler=scheduler)


def pipeline(seed: int) -> Any:
    return _pipeline({role: aligned(module) for role, module in modules(seed).items()})


def loaded(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "transformer": diffusers.QwenImageTransformer2DModel,
        "vae": diffusers.AutoencoderKLQwenImage,
    }
    return _pipeline(
        {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    )


def write_folder(path: Path, seed: int, **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {"_class_name": "QwenImagePipeline", "scheduler": scheduler}
    for role, module in modules(seed).items():
        module.save_pretrained(path / role, **save)
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def wan_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """The VAE's tensors under Wan's names."""
    state = module.state_dict()
    out = {row.sources[-1].name: state.pop(row.name).clone() for row in configs()["vae"].rows()}
    for name, tensor in state.items():
        ours, _, rest = name.partition(".time_conv.")
        number = {"encoder.down_blocks.3": 3, "encoder.down_blocks.5": 5}.get(ours)
        half = "encoder.downsamples" if number is not None else "decoder.upsamples"
        if number is None:
            number = {"decoder.up_blocks.0.upsamplers.0": 2, "decoder.up_blocks.1.upsamplers.0": 5}[ours]
        out[f"{half}.{number}.time_conv.{rest}"] = tensor.clone()
    return out


def parts(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each component under the names that files of its own have."""
    built = modules(seed)
    encoder = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.clone()
        for name, tensor in built["text_encoder"].state_dict().items()
    }
    transformer = {name: tensor.clone() for name, tensor in built["transformer"].state_dict().items()}
    return {"text_encoder": encoder, "transformer": transformer, "vae": wan_names(built["vae"])}


TRANSFORMER = "diffusion_models/qwen_image_tiny.safetensors"
TEXT_ENCODER = "text_encoders/qwen_2.5_vl_tiny.safetensors"
VAE = "vae/qwen_image_vae_tiny.safetensors"


def write_files(folder: Path, seed: int, prefix: str = "model.diffusion_model.", text_prefix: str = "model.") -> Path:
    """Write a folder as ComfyUI has it: the transformer, the text encoder and the VAE in a file each."""
    tensors = parts(seed)
    encoder = {
        (text_prefix + name.removeprefix("model.") if name.startswith("model.") else name): tensor
        for name, tensor in tensors["text_encoder"].items()
    }
    files = {
        TRANSFORMER: {prefix + name: tensor for name, tensor in tensors["transformer"].items()},
        TEXT_ENCODER: encoder,
        VAE: tensors["vae"],
    }
    for name, some in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(some, folder / name)
    return folder
