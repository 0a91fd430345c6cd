"""Chroma, in its variants HD, Base, Flash and those before them (Lodestone Rock 2025). It comes from FLUX.1 schnell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from safelight.families.chroma import transformer
from safelight.families.chroma.transformer import ChromaConfig
from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES
from safelight.families.parts import flux_adapters, flux_blocks, t5, vae
from safelight.families.parts.flux_latents import FLUX_LATENTS, FLUX_VAE, SCALING_FACTOR, SHIFT_FACTOR
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.tokens import axes
from safelight.families.parts.vae import VAEConfig
from safelight.families.rules import rule
from safelight.families.tables import is_architecture, reason_by_component
from safelight.families.tokenizer_file import TokenizerFile
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

HD, BASE, FLASH, UNLOCKED = "hd", "base", "flash", "unlocked"
"""Chroma1-HD, Chroma1-Base, Chroma1-Flash, and the published states of the training before them (chroma-unlocked)."""

T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoder.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_GUIDANCE = _PREFIX + rf"{transformer.GUIDANCE}\.in_proj\."
_DOUBLE = _PREFIX + r"(double_blocks\.0\.img_attn\.|transformer_blocks\.0\.attn\.)"
_WHAT = "a network that computes the modulation of all blocks"

_HD_SHIFT, _NO_SHIFT = 3.0, 1.0


def _recognise_folder(folder: Folder) -> str | None:
    fits = is_architecture(transformer.infer, folder.components.get("transformer"))
    return f"a transformer with {_WHAT}" if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of Chroma")


def _folder_variant(folder: Folder) -> str | None:
    """Tell the variants by the scheduler's settings, in which all published folders differ."""
    if folder.scheduler.get("use_beta_sigmas"):
        return BASE
    if folder.scheduler.get("use_dynamic_shifting"):
        return UNLOCKED
    return {_HD_SHIFT: HD, _NO_SHIFT: FLASH}.get(folder.scheduler.get("shift", 0.0))


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, ChromaConfig)
    if isinstance(encoder, T5Config) and net.text_width != encoder.width:
        return f"its transformer reads text {net.text_width} wide, its T5 returns {encoder.width}"
    if isinstance(auto, VAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net = configs["transformer"]
    assert isinstance(net, ChromaConfig)
    yield "transformer", "patch_size", 1
    yield "transformer", "axes_dims_rope", list(axes(net.head_size))
    yield from t5.folder_settings("text_encoder")
    yield "vae", "scaling_factor", SCALING_FACTOR
    yield "vae", "shift_factor", SHIFT_FACTOR


def _left_over(name: str) -> str | None:
    return reason_by_component(name, (T5_PREFIXES, t5.unread_reason))


CHROMA = Family(
    name="chroma",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            T5_PREFIXES,
            t5.infer,
            t5.T5_XXL,
            lora_prefixes=("lora_te_", "lora_te3_"),
            lora_paths=("text_encoders.t5xxl.transformer.",),
            overflows_in_fp16=True,
            tokenizer=TokenizerFile("tokenizer/tokenizer.json", shipped=t5.SHIPPED),
            most_tokens=t5.TOKENS - 1,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            ChromaConfig(64, 16, 3072, 19, 38, 128, 4096, 64, 5120, 5),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=flux_blocks.block_of,
        ),
        Component("vae", Purpose.VAE, ("vae.", "first_stage_model."), vae.infer, FLUX_VAE),
    ),
    architectures=(T5Config, ChromaConfig, VAEConfig),
    latents=replace(FLUX_LATENTS, fp32=False),
    noise=Noise("flow", {"shift": _HD_SHIFT}),
    resolution=1024,
    guidance="classifier_free",
    features=PLAIN_TEXT_FEATURES,
    model_module="safelight.families.chroma.model",
    rules=(rule("checkpoint", "chroma", f"{_WHAT}, and a text encoder", _GUIDANCE, _DOUBLE, r"text_encoders?[._]"),),
    part_rules=(rule("denoiser", "chroma", f"{_WHAT}, alone", _GUIDANCE, _DOUBLE),),
    single_file_components=(
        SingleFileComponent("text_encoder", "", "T5 text encoder", t5.infer, t5.PATTERN, t5.unread_reason),
    ),
    separate_parts=True,
    asks_variant=lambda _: True,
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: None,
    variants={
        HD: Variant(defaults=Defaults(40, 3.0)),
        BASE: Variant(noise=Noise("flow", {"shift": _NO_SHIFT}, spacing="beta"), defaults=Defaults(40, 3.0)),
        # Trained for few steps, and with the guidance in its weights.
        FLASH: Variant(noise=Noise("flow", {"shift": _NO_SHIFT}), defaults=Defaults(16, 1.0)),
        UNLOCKED: Variant(noise=Noise("flow", mu=flux_blocks.mu), defaults=Defaults(35, 5.0)),
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=_folder_variant,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    # Each prompt has a call of its own in diffusers' pipeline. Rows that are computed together have other last bits.
    rows_together=False,
    latent_space="flux",
    adapter_signs=AdapterSigns(
        names=re.compile(transformer.GUIDANCE),
        shapes=flux_adapters.may_change_flux1,
        declared=frozenset({"chroma", "chroma1", "chroma1-hd", "chroma1-base", "chroma1-flash"}),
    ),
    gguf_architecture="flux",
    pipeline_class="ChromaPipeline",
    empty_pipeline_components=("image_encoder", "feature_extractor"),
)

FAMILIES = (CHROMA,)
