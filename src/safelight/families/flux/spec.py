"""FLUX.1, in its variants dev, Krea, schnell, Kontext and Fill (Black Forest Labs 2024 and 2025)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import (
    CONTROLNET,
    AdapterSigns,
    Defaults,
    Family,
    Noise,
    Training,
    Variant,
)
from safelight.families.features import Feature
from safelight.families.flux import controlnet, transformer
from safelight.families.flux.controlnet import FluxControlNetConfig
from safelight.families.flux.transformer import FluxConfig
from safelight.families.parts import clip, flux_adapters, flux_blocks, t5, vae
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.flux_latents import FLUX_LATENTS, FLUX_VAE, SCALING_FACTOR, SHIFT_FACTOR
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.tokens import PATCH, axes
from safelight.families.parts.vae import VAEConfig
from safelight.families.references import References, Size
from safelight.families.rules import rule
from safelight.families.tables import NotThisArchitecture, Shapes, is_architecture, reason_by_component
from safelight.families.tokenizer_file import TokenizerFile
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

DEV, KREA, SCHNELL, KONTEXT, FILL = "dev", "krea", "schnell", "kontext", "fill"

CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "text_encoder.")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoder_2.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
"""What the names of the transformer's tensors begin with."""

_PIPELINES: Mapping[str, str] = {
    **dict.fromkeys(("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"), DEV),
    **dict.fromkeys(("FluxKontextPipeline", "FluxKontextInpaintPipeline"), KONTEXT),
}
"""The variant of a folder with dev's tensors, by its pipeline. Krea has dev's pipeline."""

_REFERENCE_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
"""Sizes in which Kontext was trained to see a picture, (width, height)."""

TOKEN_PIXELS = 16
"""Pixels of a token in each direction."""

VOCABULARY, POSITIONS = 49408, 77
"""Tokens that CLIP knows, and tokens of a text."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_DOUBLE = _PREFIX + r"(double_blocks\.0\.img_mod\.|transformer_blocks\.0\.norm1\.linear\.)"
_SINGLE = _PREFIX + r"(single_blocks\.0\.modulation\.|single_transformer_blocks\.0\.norm\.linear\.)"

_OWN_NAMES = re.compile(
    r"(img|txt)_mod[._]lin|single_blocks[._][0-9]+[._]modulation[._]lin|(vector|guidance|time)_in[._](in|out)_layer"
    r"|transformer_blocks[._][0-9]+[._]norm(1|1_context)?[._]linear(?!_[12])|time_text_embed[._]"
)
"""Names of modules in adapters that Chroma does not have: modulations, and what computes them."""

_CONTROL_INPUT = r"(controlnet_(x_embedder|blocks\.0)|pos_embed_input)\.(weight|bias)$"
_CONTROL_BLOCKS = r"(double_blocks\.0\.img_mod\.|transformer_blocks\.0\.norm1_context\.)"
_WHAT = "double blocks, each with its modulation, and single blocks"


def reference_size(size: Size) -> Size:
    """Return the size in which Kontext sees a picture, as diffusers chooses it: the one with the most similar ratio."""
    width, height = (side // TOKEN_PIXELS * TOKEN_PIXELS for side in size)
    return min(_REFERENCE_SIZES, key=lambda one: (abs(width / height - one[0] / one[1]), one))


def _infer_clip(shapes: Shapes) -> CLIPConfig:
    config = clip.without_projection(clip.infer(shapes, "quick_gelu"))
    for ending, rows, wanted in (
        ("token_embedding.weight", config.vocabulary, VOCABULARY),
        ("position_embedding.weight", config.positions, POSITIONS),
    ):
        if rows != wanted:
            name = next(name for name in shapes if name.endswith(ending))
            raise NotThisArchitecture(f"it has {rows} rows, and CLIP has {wanted}", name)
    return config


def _recognise_folder(folder: Folder) -> str | None:
    fits = "text_encoder_2" in folder.components and is_architecture(
        transformer.infer, folder.components.get("transformer")
    )
    return f"a transformer with {_WHAT}" if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of FLUX.1")


def _variant(configs: Mapping[str, Config]) -> str | None:
    """Tell dev from schnell by the guidance scale, which only dev reads.

    Krea and Kontext have the same tensors as dev. A folder's pipeline tells Kontext from dev; for a single file, the
    user says which it is. Fill also reads the latents of a picture and a mask.
    """
    net = configs["transformer"]
    assert isinstance(net, FluxConfig)
    latents, mask = net.channels * PATCH**2, TOKEN_PIXELS**2
    if net.inputs == 2 * latents + mask:
        return FILL
    if net.inputs != latents:
        return None
    return DEV if net.guidance else SCHNELL


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net = configs["transformer"]
    first, second, auto = (configs.get(role) for role in ("text_encoder", "text_encoder_2", "vae"))
    assert isinstance(net, FluxConfig)
    if isinstance(first, CLIPConfig) and net.pooled_width != first.width:
        return f"its transformer reads a pooled output {net.pooled_width} wide, its CLIP returns {first.width}"
    if isinstance(second, T5Config) and net.text_width != second.width:
        return f"its transformer reads text {net.text_width} wide, its T5 returns {second.width}"
    if isinstance(auto, VAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net = configs["transformer"]
    assert isinstance(net, FluxConfig)
    yield "transformer", "guidance_embeds", net.guidance
    yield "transformer", "patch_size", 1
    yield "transformer", "axes_dims_rope", list(axes(net.head_size))
    yield "text_encoder", "hidden_act", "quick_gelu"
    yield from t5.folder_settings("text_encoder_2")
    yield "vae", "scaling_factor", SCALING_FACTOR
    yield "vae", "shift_factor", SHIFT_FACTOR


def _unread_in_clip(name: str) -> str | None:
    if re.fullmatch(r"(text_model\.)?(text_projection(\.weight)?|logit_scale|embeddings\.position_ids)", name):
        return "not used: the pooled output is read before its projection"
    return None


def _left_over(name: str) -> str | None:
    return reason_by_component(name, (CLIP_PREFIXES, _unread_in_clip), (T5_PREFIXES, t5.unread_reason))


FLUX = Family(
    name="flux",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            CLIP_PREFIXES,
            _infer_clip,
            CLIPConfig(768, 3072, 12, VOCABULARY, POSITIONS, None, "quick_gelu"),
            lora_prefixes=("lora_te1_", "lora_te_"),
            lora_paths=("text_encoders.clip_l.transformer.",),
            optional_prefix="text_model.",
            tokenizer=clip.tokenizer(),
            most_tokens=75,
        ),
        Component(
            "text_encoder_2",
            Purpose.TEXT_ENCODER,
            T5_PREFIXES,
            t5.infer,
            t5.T5_XXL,
            lora_prefixes=("lora_te2_", "lora_te3_"),
            lora_paths=("text_encoders.t5xxl.transformer.",),
            overflows_in_fp16=True,
            tokenizer=TokenizerFile("tokenizer_2/tokenizer.json", shipped=t5.SHIPPED),
            most_tokens=t5.TOKENS - 1,
            most_tokens_of={"schnell": 255},
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            FluxConfig(64, 16, 3072, 19, 38, 128, 4096, 768, guidance=True),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            adapter_sources=transformer.xlabs_sources,
            block_of=flux_blocks.block_of,
        ),
        Component("vae", Purpose.VAE, ("vae.", "first_stage_model."), vae.infer, FLUX_VAE),
    ),
    architectures=(CLIPConfig, T5Config, FluxConfig, VAEConfig, FluxControlNetConfig),
    latents=replace(FLUX_LATENTS, fp32=False),
    noise=Noise("flow", mu=flux_blocks.mu),
    resolution=1024,
    guidance="distilled",
    features=frozenset(
        {
            Feature.TEXT_TO_IMAGE,
            Feature.IMAGE_TO_IMAGE,
            Feature.INPAINTING,
            Feature.HIRES,
            Feature.TILED_VAE,
            Feature.CONTROLNET,
            Feature.FIRST_BLOCK_CACHE,
        }
    ),
    control_modes=frozenset({"balanced"}),
    find_controlnet_mismatch=controlnet.find_mismatch,
    model_module="safelight.families.flux.model",
    rules=(rule("checkpoint", "flux", f"{_WHAT}, and text encoders", _DOUBLE, _SINGLE, r"text_encoders?[._]"),),
    adapter_rules=(
        rule(
            CONTROLNET,
            "flux",
            "an input for a picture, and double blocks, each with its modulation",
            _CONTROL_INPUT,
            _CONTROL_BLOCKS,
        ),
        rule(
            "control_lora",
            "flux",
            "low-rank pairs with whole norms: a LoRA that makes FLUX.1 read a second picture (Control-LoRA)",
            r".*\.lora_A\.weight$",
            r".*\.norm\.query_norm\.scale$",
        ),
        rule(
            "lora", "flux", "low-rank pairs named as XLabs names them", r".*\.processor\.(qkv|proj)_lora[12]?\.down\."
        ),
    ),
    part_rules=(
        rule("denoiser", "flux", f"{_WHAT}, alone", _DOUBLE, _SINGLE),
        rule("text_encoder", None, "a T5 encoder", t5.PATTERN),
    ),
    single_file_components=(
        SingleFileComponent(
            "text_encoder",
            "",
            "CLIP text encoder",
            _infer_clip,
            clip.PATTERN,
            _unread_in_clip,
        ),
        SingleFileComponent(
            "text_encoder", "", "T5 text encoder", t5.infer, t5.PATTERN, t5.unread_reason, role="text_encoder_2"
        ),
        SingleFileComponent(CONTROLNET, "", "FLUX.1 ControlNet", controlnet.infer, _CONTROL_BLOCKS),
    ),
    separate_parts=True,
    asks_variant=lambda configs: _variant(configs) == DEV,
    detect_training=lambda _: _FLOW,
    detect_variant=_variant,
    variants={
        DEV: Variant(defaults=Defaults(28, 1.0, 3.5)),
        KREA: Variant(defaults=Defaults(28, 1.0, 4.5)),
        SCHNELL: Variant(guidance="none", noise=Noise("flow", {"shift": 1.0}), defaults=Defaults(4, 1.0)),
        KONTEXT: Variant(
            defaults=Defaults(28, 1.0, 2.5),
            references=References(reference_size, most=1, least_side=TOKEN_PIXELS),
            draws_latents=False,
            index={"_class_name": "FluxKontextPipeline"},
        ),
        FILL: Variant("pixel_mask", defaults=Defaults(50, 1.0, 30.0), index={"_class_name": "FluxFillPipeline"}),
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    # The name of dev does not decide: trainers write it for models that were made from Krea, too.
    declared_variants={f"flux{mark}1-{variant}-dev": variant for mark in "-." for variant in (KONTEXT, KREA)},
    detect_folder_variant=lambda folder: _PIPELINES.get(folder.pipeline),
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    latent_space="flux",
    adapter_signs=AdapterSigns(
        names=_OWN_NAMES,
        shapes=flux_adapters.may_change_flux1,
        declared=frozenset({"flux1", "flux-1-dev", "flux-1-schnell", "flux.1-dev", "flux.1-schnell"}),
    ),
    gguf_architecture="flux",
    pipeline_class="FluxPipeline",
    empty_pipeline_components=("image_encoder", "feature_extractor"),
)

FAMILIES = (FLUX,)
