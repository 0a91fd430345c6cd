"""FLUX.1, in its variants dev, Krea and schnell (Black Forest Labs 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from safelight.families.family import (
    AdapterSigns,
    Component,
    Config,
    Defaults,
    Family,
    Noise,
    SingleFileComponent,
    Training,
    Variant,
)
from safelight.families.features import Feature
from safelight.families.flux import transformer
from safelight.families.flux.transformer import PATCH, FluxConfig
from safelight.families.parts import clip, t5, vae
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.flux_latents import FLUX_LATENTS, FLUX_VAE, SCALING_FACTOR, SHIFT_FACTOR
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig
from safelight.families.rules import rule
from safelight.families.tables import Shapes, is_architecture
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

DEV, KREA, SCHNELL = "dev", "krea", "schnell"

CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "text_encoder.")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoder_2.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
"""What the names of the transformer's tensors begin with."""

_PIPELINES = frozenset({"FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"})
"""The pipelines of dev and Krea. Kontext, which has the same tensors, has another."""

_FEWEST_TOKENS, _LEAST_MU = 256, 0.5
_MOST_TOKENS, _MOST_MU = 4096, 1.15

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_DOUBLE = _PREFIX + r"(double_blocks\.0\.img_mod\.|transformer_blocks\.0\.attn\.norm_added_q\.)"
_SINGLE = _PREFIX + r"(single_blocks\.0\.modulation\.|single_transformer_blocks\.0\.)"
_ADAPTER_NAMES = (
    r"(^|[._])((double_blocks|single_blocks|single_transformer_blocks)[._][0-9]"
    r"|transformer_blocks[._][0-9]+[._](ff_context|norm1_context)[._])"
)
_WHAT = "double blocks, each with its modulation, and single blocks"


def mu(tokens: int, steps: int) -> float:
    """Return the shift of the noise levels: a line through 0.5 for 256 tokens and 1.15 for 4096."""
    del steps
    # In the order of diffusers' ``calculate_shift``, for the last bit.
    slope = (_MOST_MU - _LEAST_MU) / (_MOST_TOKENS - _FEWEST_TOKENS)
    return tokens * slope + (_LEAST_MU - slope * _FEWEST_TOKENS)


def _infer_clip(shapes: Shapes) -> CLIPConfig:
    return clip.without_projection(clip.infer(shapes, "quick_gelu"))


def _recognise_folder(folder: Folder) -> str | None:
    fits = "text_encoder_2" in folder.components and is_architecture(
        transformer.infer, folder.components.get("transformer")
    )
    return f"a transformer with {_WHAT}" if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of FLUX.1")


def _variant(configs: Mapping[str, Config]) -> str | None:
    """Tell dev from schnell by the guidance scale, which only dev reads.

    Krea and Kontext have the same tensors as dev. A folder is taken for dev by its pipeline; for a single file, the
    user says which it is.
    """
    net = configs["transformer"]
    assert isinstance(net, FluxConfig)
    if net.inputs != net.channels * PATCH**2:
        # It also reads the latents of a picture.
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
    yield "text_encoder_2", "feed_forward_proj", "gated-gelu"
    yield "text_encoder_2", "relative_attention_max_distance", 128
    yield "text_encoder_2", "layer_norm_epsilon", 1e-6
    yield "vae", "scaling_factor", SCALING_FACTOR
    yield "vae", "shift_factor", SHIFT_FACTOR


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the picture's number, the row and the column.

    Of the published 128 they are 16, 56 and 56.
    """
    side = (head_size - head_size // 8) // 2
    return head_size // 8, side, side


def _unread_in_clip(name: str) -> str | None:
    if re.fullmatch(r"(text_model\.)?(text_projection(\.weight)?|logit_scale|embeddings\.position_ids)", name):
        return "not used: the pooled output is read before its projection"
    return None


def _left_over(name: str) -> str | None:
    for prefixes, reason in ((CLIP_PREFIXES, _unread_in_clip), (T5_PREFIXES, t5.unread_reason)):
        for prefix in prefixes:
            if name.startswith(prefix):
                return reason(name.removeprefix(prefix))
    return None


FLUX = Family(
    name="flux",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            CLIP_PREFIXES,
            _infer_clip,
            CLIPConfig(768, 3072, 12, 49408, 77, None, "quick_gelu"),
            lora_prefixes=("lora_te1_", "lora_te_"),
            lora_paths=("text_encoders.clip_l.transformer.",),
            optional_prefix="text_model.",
        ),
        Component(
            "text_encoder_2",
            Purpose.TEXT_ENCODER,
            T5_PREFIXES,
            t5.infer,
            T5Config(32128, 4096, 10240, 24, 64, 64),
            lora_prefixes=("lora_te2_", "lora_te3_"),
            lora_paths=("text_encoders.t5xxl.transformer.",),
            overflows_in_fp16=True,
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
            block_of=transformer.block_of,
        ),
        Component("vae", Purpose.VAE, ("vae.", "first_stage_model."), vae.infer, FLUX_VAE),
    ),
    architectures=(CLIPConfig, T5Config, FluxConfig, VAEConfig),
    latents=replace(FLUX_LATENTS, fp32=False),
    noise=Noise("flow", mu=mu),
    resolution=1024,
    guidance="distilled",
    features=frozenset(
        {
            Feature.TEXT_TO_IMAGE,
            Feature.IMAGE_TO_IMAGE,
            Feature.INPAINTING,
            Feature.HIRES,
            Feature.TILED_VAE,
        }
    ),
    model_module="safelight.families.flux.model",
    rules=(rule("checkpoint", "flux", f"{_WHAT}, and text encoders", _DOUBLE, _SINGLE, r"text_encoders?[._]"),),
    adapter_rules=(
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
            r"(text_model\.)?embeddings\.token_embedding\.",
            _unread_in_clip,
        ),
        SingleFileComponent("text_encoder", "", "T5 text encoder", t5.infer, t5.PATTERN, t5.unread_reason),
    ),
    separate_parts=True,
    asks_variant=lambda configs: _variant(configs) == DEV,
    detect_training=lambda _: _FLOW,
    detect_variant=_variant,
    variants={
        DEV: Variant(defaults=Defaults(28, 1.0, 3.5)),
        KREA: Variant(defaults=Defaults(28, 1.0, 4.5)),
        SCHNELL: Variant(guidance="none", noise=Noise("flow", {"shift": 1.0}), defaults=Defaults(4, 1.0)),
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=lambda folder: DEV if folder.pipeline in _PIPELINES else None,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    latent_space="flux",
    adapter_signs=AdapterSigns(
        names=re.compile(_ADAPTER_NAMES),
        declared=frozenset({"flux1", "flux-1-dev", "flux-1-schnell", "flux.1-dev", "flux.1-schnell"}),
    ),
    pipeline_class="FluxPipeline",
    empty_pipeline_components=("image_encoder", "feature_extractor"),
)

FAMILIES = (FLUX,)
