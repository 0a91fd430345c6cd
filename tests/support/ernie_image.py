"""Tiny random ERNIE-Image checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from safelight.families.components import Config
from safelight.families.ernie_image.transformer import ErnieImageConfig
from safelight.families.parts.flux2_vae import Flux2VAEConfig
from safelight.families.parts.ministral3 import Ministral3Config

LAYERS = 3
"""Layers of the text encoder in files; Safelight computes one less."""

VOCABULARY = 320
SCHEDULER = {"shift": 4.0, "use_dynamic_shifting": False}

VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}


def configs() -> dict[str, Config]:
    """The narrowest settings that the libraries allow."""
    return {
        "text_encoder": Ministral3Config(VOCABULARY, 32, 64, LAYERS, 2, 1),
        "transformer": ErnieImageConfig(128, 64, 96, 2, 32, 32),
        "vae": Flux2VAEConfig(3, 3, 32, (32, 32, 32, 32), 1),
    }


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them."""
    generator = torch.Generator().manual_seed(seed)
    built: dict[str, Any] = {
        role: random_module("ernie-image", config, generator) for role, config in configs().items()
    }
    inner = built["text_encoder"]
    settings = Mistral3Config(text_config=inner.config.to_dict(), vision_config=VISION)
    whole = Mistral3Model(settings).eval().requires_grad_(False)
    for parameter in whole.parameters():
        parameter.normal_(0, 0.1, generator=generator)
    whole.language_model.load_state_dict(inner.state_dict(), strict=False)
    built["text_encoder"] = whole
    kept = {name: value for name, value in built["vae"].config.items() if not name.startswith("_")}
    vae: Any = diffusers.AutoencoderKLFlux2(**kept)
    vae.eval().requires_grad_(False).load_state_dict(
        {**built["vae"].state_dict(), "bn.num_batches_tracked": torch.tensor(7)}
    )
    built["vae"] = vae
    return built


@cache
def tokenizer_file() -> str:
    """The content of a small tokenizer's file. Like the published one, it puts a token before each text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{n}>" for n in range(9))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["a red apple on a green table, a small cat in the rain"] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made.to_str()


def tokenizer() -> Any:
    """The tokenizer as transformers loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_file()), bos_token="<s>", eos_token="</s>"
    )


def _pipeline(built: dict[str, Any]) -> Any:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    plain: Any = diffusers.ErnieImagePipeline
    return plain(**built, tokenizer=tokenizer(), scheduler=scheduler)


def pipeline(seed: int) -> Any:
    return _pipeline({role: aligned(module) for role, module in modules(seed).items()})


def loaded(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": Mistral3Model,
        "transformer": diffusers.ErnieImageTransformer2DModel,
        "vae": diffusers.AutoencoderKLFlux2,
    }
    return _pipeline(
        {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}
    )


def write_folder(path: Path, seed: int, **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    index: dict[str, Any] = {
        "_class_name": "ErnieImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "pe": [None, None],
    }
    for role, module in modules(seed).items():
        module.save_pretrained(path / role, **save)  # type: ignore[operator]
        index[role] = ["transformers" if role == "text_encoder" else "diffusers", type(module).__name__]
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "tokenizer").mkdir()
    (path / "tokenizer/tokenizer.json").write_text(tokenizer_file())
    (path / "model_index.json").write_text(json.dumps(index))
    return path
