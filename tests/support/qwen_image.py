"""Tiny random Qwen-Image checkpoints, and diffusers' own pipelines with the same weights."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import random_module
from support.libraries import diffusers
from support.oracle import aligned
from tokenizers import AddedToken
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from safelight.families.components import Config
from safelight.families.parts import qwen25_model
from safelight.families.parts.qwen25 import Qwen25Config
from safelight.families.parts.qwen25_model import PICTURE, PICTURE_TOKEN
from safelight.families.parts.qwen25_vision import MOST_PIXELS, Qwen25VisionConfig
from safelight.families.parts.qwen_vae import QwenVAEConfig
from safelight.families.qwen_image import spec
from safelight.families.qwen_image.spec import EDIT, EDIT_2509, EDIT_2511, TEXT_TO_IMAGE
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

PIPELINES: dict[str, Any] = {
    TEXT_TO_IMAGE: diffusers.QwenImagePipeline,
    EDIT: diffusers.QwenImageEditPipeline,
    EDIT_2509: diffusers.QwenImageEditPlusPipeline,
    EDIT_2511: diffusers.QwenImageEditPlusPipeline,
}


def configs(variant: str = TEXT_TO_IMAGE) -> dict[str, Config]:
    """The narrowest settings that the libraries allow. Only every eighth block of the vision encoder has no windows."""
    found: dict[str, Config] = {
        "text_encoder": Qwen25Config(VOCABULARY, 32, 64, 6, 2, 1),
        "transformer": QwenImageConfig(64, 16, 64, 2, 32, 32, variant == EDIT_2511),
        "vae": QwenVAEConfig(3, 16, 8, (1, 2, 4, 4), 1),
    }
    return found if variant == TEXT_TO_IMAGE else {**found, "vision_encoder": Qwen25VisionConfig(160, 48, 8, 32)}


def modules(seed: int = 0, variant: str = TEXT_TO_IMAGE) -> dict[str, Any]:
    """Build modules of the libraries in fp32, with seeded random weights, as published folders have them.

    The text encoder has its vision encoder and its head, the VAE its convolutions over frames. The variants differ in
    nothing but a setting of the transformer.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = {**configs(EDIT), **configs(variant)}
    built: dict[str, Any] = {role: random_module("qwen-image", config, generator) for role, config in wanted.items()}
    built["text_encoder"] = _whole_encoder(built["text_encoder"], built.pop("vision_encoder"))
    settings = {name: value for name, value in built["vae"].config.items() if not name.startswith("_")}
    kind: Any = diffusers.AutoencoderKLQwenImage
    vae = kind(**{**settings, "temperal_downsample": [False, True, True]})
    vae.load_state_dict(built["vae"].state_dict(), strict=False)
    built["vae"] = vae.eval().requires_grad_(False)
    return built


def _whole_encoder(language: Any, vision: Any) -> nn.Module:
    kind: Any = Qwen2_5_VLConfig
    settings = kind(
        text_config=language.config.to_dict(), vision_config=vision.config.to_dict(), attn_implementation="sdpa"
    )
    # The same head for every seed.
    torch.manual_seed(0)
    kind: Any = Qwen2_5_VLForConditionalGeneration
    whole = kind(settings).eval().requires_grad_(False)
    whole.model.language_model.load_state_dict(language.state_dict())
    whole.model.visual.load_state_dict(vision.state_dict())
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


class Processor:
    """transformers' ``Qwen2VLProcessor`` without its processor of videos, which needs torchvision."""

    def __init__(self) -> None:
        kind: Any = Qwen2VLImageProcessorPil
        self.image_processor = kind(max_pixels=MOST_PIXELS)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        del padding
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter([int(grid.prod()) // 4 for grid in seen["image_grid_thw"]])
        [whole] = text
        filled = re.sub(re.escape(PICTURE), lambda _: PICTURE * next(counts), whole)
        read = tokenizer()([filled], return_tensors=return_tensors)
        return BatchFeature({**read, **seen})


def _tell_pictures_from_text(encoder: Any, args: Any, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add ``mm_token_type_ids`` to the inputs of a text encoder.

    diffusers' pipelines for editing do not pass it: before version 5, transformers computed it. Without it, version 5
    counts the tokens of a picture as those of a text.
    """
    del encoder
    return args, {**more, "mm_token_type_ids": (more["input_ids"] == PICTURE_TOKEN).int()}


SMALL = {1024 * 1024: 96 * 64, 384 * 384: 160 * 160}
"""About how many pixels the pictures have in the tests, in place of the published numbers. The vision encoder sees
several windows."""


def _small_dimensions(published: Any, area: int, ratio: float) -> Any:
    return published(SMALL[area], ratio)


def make_references_small(patch: pytest.MonkeyPatch) -> None:
    """Let Safelight and diffusers see reference images in the sizes of :data:`SMALL`."""
    patch.setattr(spec, "REFERENCE_PIXELS", SMALL[spec.REFERENCE_PIXELS])
    patch.setattr(spec, "CONDITION_PIXELS", SMALL[spec.CONDITION_PIXELS])
    pipelines = diffusers.pipelines.qwenimage
    for module in (pipelines.pipeline_qwenimage_edit, pipelines.pipeline_qwenimage_edit_plus):
        patch.setattr(module, "calculate_dimensions", partial(_small_dimensions, module.calculate_dimensions))


def _pipeline(built: dict[str, Any], variant: str = TEXT_TO_IMAGE) -> Any:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    if variant == TEXT_TO_IMAGE:
        return diffusers.QwenImagePipeline(**built, tokenizer=tokenizer(), scheduler=scheduler)
    built["text_encoder"].register_forward_pre_hook(_tell_pictures_from_text, with_kwargs=True)
    processor: Any = Processor()
    return PIPELINES[variant](**built, tokenizer=tokenizer(), scheduler=scheduler, processor=processor)


def pipeline(seed: int, variant: str = TEXT_TO_IMAGE) -> Any:
    return _pipeline({role: aligned(module) for role, module in modules(seed, variant).items()}, variant)


def loaded(path: Path, dtype: torch.dtype, variant: str = TEXT_TO_IMAGE) -> Any:
    """The pipeline of a folder, as ``from_pretrained`` loads each component."""
    kinds: dict[str, Any] = {
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "transformer": diffusers.QwenImageTransformer2DModel,
        "vae": diffusers.AutoencoderKLQwenImage,
    }
    return _pipeline(
        {role: aligned(kind.from_pretrained(path / role, torch_dtype=dtype)) for role, kind in kinds.items()}, variant
    )


def write_folder(path: Path, seed: int, variant: str = TEXT_TO_IMAGE, **save: Any) -> Path:
    """Write a diffusers folder; the libraries' ``save_pretrained`` writes each component."""
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index: dict[str, Any] = {"_class_name": PIPELINES[variant].__name__, "scheduler": scheduler}
    for role, module in modules(seed, variant).items():
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
