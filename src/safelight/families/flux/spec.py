"""FLUX.1, in its variants dev, Krea, schnell, Kontext and Fill (Black Forest Labs 2024 and 2025)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from safelight.families.family import (
    CONTROLNET,
    AdapterSigns,
    Component,
    Config,
    Defaults,
    Family,
    Noise,
    References,
    SingleFileComponent,
    Size,
    Training,
    Variant,
)
from safelight.families.features import Feature
from safelight.families.flux import controlnet, transformer
from safelight.families.flux.controlnet import FluxControlNetConfig
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

_FEWEST_TOKENS, _LEAST_MU = 256, 0.5
_MOST_TOKENS, _MOST_MU = 4096, 1.15

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_DOUBLE = _PREFIX + r"(double_blocks\.0\.img_mod\.|transformer_blocks\.0\.norm1\.linear\.)"
_SINGLE = _PREFIX + r"(single_blocks\.0\.modulation\.|single_transformer_blocks\.0\.norm\.linear\.)"
_ADAPTER_NAMES = (
    r"(^|[._])((double_blocks|single_blocks|single_transformer_blocks)[._][0-9]"
    r"|transformer_blocks[._][0-9]+[._](ff_context|norm1_context)[._])"
)
_CONTROL_INPUT = r"(controlnet_x_embedder|pos_embed_input)\.weight$"
_CONTROL_BLOCKS = r"(double_blocks\.0\.img_mod\.|transformer_blocks\.0\.norm1_context\.)"
_WHAT = "double blocks, each with its modulation, and single blocks"


def mu(tokens: int, steps: int) -> float:
    """Return the shift of the noise levels: a line through 0.5 for 256 tokens and 1.15 for 4096."""
    del steps
    # In the order of diffusers' ``calculate_shift``, for the last bit.
    slope = (_MOST_MU - _LEAST_MU) / (_MOST_TOKENS - _FEWEST_TOKENS)
    return tokens * slope + (_LEAST_MU - slope * _FEWEST_TOKENS)


def reference_size(size: Size) -> Size:
    """Return the size in which Kontext sees a picture, as diffusers chooses it: the one with the most similar ratio."""
    width, height = (side // TOKEN_PIXELS * TOKEN_PIXELS for side in size)
    return min(_REFERENCE_SIZES, key=lambda one: (abs(width / height - one[0] / one[1]), one))


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
    architectures=(CLIPConfig, T5Config, FluxConfig, VAEConfig, FluxControlNetConfig),
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
            Feature.CONTROLNET,
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
        SingleFileComponent("text_encoder", "", "T5 text encoder", t5.infer, t5.PATTERN, t5.unread_reason),
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
    detect_folder_variant=lambda folder: _PIPELINES.get(folder.pipeline),
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
