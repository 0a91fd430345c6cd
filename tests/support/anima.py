"""Tiny random Anima checkpoints, and diffusers' own modular pipelines with the same weights."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from support import zimage
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from safelight.families.anima.text_conditioner import AnimaConditionerConfig
from safelight.families.anima.text_encoder import Qwen3SmallConfig
from safelight.families.anima.transformer import AnimaConfig
from safelight.families.components import Config
from safelight.families.parts import t5
from safelight.families.parts.qwen_vae import QwenVAEConfig

SHIFT = 3.0

PUBLISHED = {"in_channels": 16, "concat_padding_mask": True, "max_size": (128, 240, 240)}
"""Settings of the transformer that Safelight's own module has in another way."""


def _resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return F.interpolate(mask, size=size, mode=interpolation)


# diffusers resizes the mask of padding with torchvision, which the tests' installation lacks.
transformer_cosmos.transforms = SimpleNamespace(  # type: ignore[attr-defined]
    functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
)


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Qwen3SmallConfig(zimage.VOCABULARY, 32, 64, 2, 4, 2, 16),
        "text_conditioner": AnimaConditionerConfig(32128, 32, 48, 32, 64, 2, 16),
        "transformer": AnimaConfig(16, 64, 2, 128, 32, 48, 16),
        "vae": QwenVAEConfig(3, 16, 8, (1, 2, 2, 2), 1),
    }


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them."""
    generator = torch.Generator().manual_seed(seed)
    built: dict[str, Any] = {role: random_module("anima", config, generator) for role, config in configs().items()}
    net = {name: one for name, one in built["transformer"].config.items() if not name.startswith("_")}
    kinds: dict[str, Any] = {"transformer": diffusers.CosmosTransformer3DModel(**net | PUBLISHED)}
    plain = {name: one for name, one in built["vae"].config.items() if not name.startswith("_")}
    kinds["vae"] = diffusers.AutoencoderKLQwenImage(**plain | {"temperal_downsample": [False, True, True]})
    for role, module in kinds.items():
        module.eval().requires_grad_(False).load_state_dict(built[role].state_dict(), strict=False)
        built[role] = module
    return built


@cache
def t5_tokenizer(folder: Path) -> Any:
    """T5's tokenizer as transformers loads it. ``folder``: where its file is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(gzip.decompress(t5.SHIPPED.path.read_bytes()))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def pipeline_of(built: dict[str, Any], folder: Path, **settings: Any) -> Any:
    """Return the modular pipeline of some components. ``settings``: of its guidance. ``folder``: for a tokenizer."""
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(
        **built,
        tokenizer=zimage.tokenizer(),
        t5_tokenizer=t5_tokenizer(folder),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        guider=diffusers.ClassifierFreeGuidance(**settings),
    )
    return pipe


def pipeline(seed: int, folder: Path, **settings: Any) -> Any:
    return pipeline_of({role: aligned(module) for role, module in modules(seed).items()}, folder, **settings)


def loaded(path: Path, folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen3Model,
        "text_conditioner": diffusers.AnimaTextConditioner,
        "transformer": diffusers.CosmosTransformer3DModel,
        "vae": diffusers.AutoencoderKLQwenImage,
    }
    built = {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    return pipeline_of(built, folder, **settings)


def write_folder(path: Path, seed: int, text_encoder_seed: int | None = None, **save: Any) -> Path:
    """Write a folder with ``save_pretrained`` of diffusers' modular pipeline, without tokenizers.

    ``text_encoder_seed``: None for the same seed.
    """
    pipe = AnimaAutoBlocks().init_pipeline()
    built = modules(seed)
    if text_encoder_seed is not None:
        built["text_encoder"] = modules(text_encoder_seed)["text_encoder"]
    pipe.update_components(**built, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT))
    pipe.save_pretrained(str(path), overwrite_modular_index=True, **save)
    return path
