"""Stable Diffusion XL and its refiner (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from safelight.families.components import Component
from safelight.families.family import AdapterSigns
from safelight.families.features import Feature
from safelight.families.parts import clip
from safelight.families.parts.clip import CLIPConfig
from safelight.families.rules import KindRule, rule
from safelight.families.sd import recognition
from safelight.families.sd.recognition import POSITIONS, VOCABULARY
from safelight.families.sd.spec import (
    CLIP_L,
    DENOISER,
    FEATURES,
    autoencoder,
    denoiser,
    first_encoder,
    latents,
    stable_diffusion,
)
from safelight.families.sd.unet import UNetConfig
from safelight.families.tables import NotThisArchitecture, Shapes
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

FACTOR = 0.13025

BLOCKS: Mapping[int, tuple[str, ...]] = {
    20: ("BASE", *(f"IN{n:02d}" for n in range(9)), "M00", *(f"OUT{n:02d}" for n in range(9))),
    12: ("BASE", *(f"IN{n:02d}" for n in (4, 5, 7, 8)), "M00", *(f"OUT{n:02d}" for n in range(6))),
}
"""As sd-webui-lora-block-weight counts them."""


def _second_encoder(*prefixes: str) -> Component:
    def infer(shapes: Shapes) -> CLIPConfig:
        config = clip.infer(shapes, "gelu")
        if config.projection is None:
            raise NotThisArchitecture("text_projection")
        return config

    return Component(
        "text_encoder_2",
        Purpose.TEXT_ENCODER,
        (*prefixes, "text_encoder_2."),
        infer,
        CLIPConfig(1280, 5120, 32, VOCABULARY, POSITIONS, 1280, "gelu"),
        lora_prefixes=("lora_te2_",),
        lora_paths=("text_encoders.clip_g.transformer.",),
        optional_prefix="text_model.",
        tokenizer=clip.tokenizer("text_encoder_2"),
    )


def _recognise_folder(encoders: int, folder: Folder) -> str | None:
    config = recognition.unet_of(folder)
    if config is None or config.time_features is None or ("text_encoder" in folder.components) != (encoders == 2):
        return None
    return "a UNet with added conditioning, " + ("two text encoders" if encoders == 2 else "one text encoder")


SDXL = stable_diffusion(
    name="sdxl",
    components=(
        first_encoder("quick_gelu", CLIP_L, False, "conditioner.embedders.0.transformer."),
        _second_encoder("conditioner.embedders.1.model."),
        denoiser(UNetConfig(4, 4, (320, 640, 1280), 2, (0, 2, 10), 10, 2048, True, 2816)),
        autoencoder(),
    ),
    latents=latents(FACTOR, cast_first=True),
    resolution=1024,
    features=FEATURES,
    model_module="safelight.families.sdxl.model",
    rules=(
        rule(
            "checkpoint", "sdxl", "two text encoders and added conditioning", r"conditioner\.embedders\.1\.", DENOISER
        ),
        rule(
            "checkpoint",
            "sdxl",
            "two text encoders in diffusers' names",
            r"unet\.",
            r"text_encoder\.",
            r"text_encoder_2\.",
        ),
    ),
    recognise_folder=partial(_recognise_folder, 2),
    folder_settings=partial(
        recognition.folder_settings, None, FACTOR, {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
    ),
    detect_training=partial(recognition.detect_training, default=recognition.epsilon("sdxl")),
    detect_folder_training=partial(recognition.detect_folder_training, default=recognition.epsilon("sdxl")),
    block_names_by_count=BLOCKS,
    latent_space="sdxl",
    adapter_signs=AdapterSigns(
        2048,
        # Only SDXL has a second CLIP and more than one transformer block per attention, so these names mean SDXL. Names
        # of other families begin with ``transformer_blocks``, and their second text encoder may be a T5.
        re.compile(
            r"(^lora_te2_(?!encoder_block_)|(^|[._])text_encoder_2\.(?!encoder\.block\.)"
            r"|[0-9][._]transformer_blocks[._][1-9][0-9]?[._])"
        ),
        None,
        frozenset({"sdxl_base_v0-9", "sdxl_base_v1-0", "stable-diffusion-xl-v0-9-base", "stable-diffusion-xl-v1-base"}),
    ),
    clip_skip_in_a1111=False,
    embedding_names={"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    gguf_architecture="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
)

REFINER = stable_diffusion(
    name="sdxl-refiner",
    components=(_second_encoder("conditioner.embedders.0.model."), denoiser(None), autoencoder()),
    latents=latents(FACTOR, cast_first=True),
    resolution=1024,
    features=FEATURES - {Feature.TEXT_TO_IMAGE},
    model_module="safelight.families.sdxl.refiner",
    rules=(
        rule(
            "checkpoint",
            "sdxl-refiner",
            "one OpenCLIP encoder and added conditioning",
            r"conditioner\.embedders\.0\.model\.",
            DENOISER,
        ),
        KindRule(
            "checkpoint",
            "sdxl-refiner",
            "only the second text encoder",
            (r"unet\.add_embedding", r"text_encoder_2\."),
            (r"text_encoder\.",),
        ),
    ),
    recognise_folder=partial(_recognise_folder, 1),
    folder_settings=partial(recognition.folder_settings, None, FACTOR, {"text_encoder_2": "gelu"}),
    detect_training=partial(recognition.detect_training, default=recognition.epsilon("sdxl-refiner")),
    detect_folder_training=partial(recognition.detect_folder_training, default=recognition.epsilon("sdxl-refiner")),
    block_names_by_count=BLOCKS,
    latent_space="sdxl",
    adapter_signs=AdapterSigns(
        1280,
        None,
        None,
        frozenset(
            {"sdxl_refiner_v0-9", "sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"},
        ),
    ),
    pipeline_class="StableDiffusionXLImg2ImgPipeline",
)

FAMILIES = (SDXL, REFINER)
