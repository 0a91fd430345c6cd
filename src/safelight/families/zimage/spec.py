"""Z-Image, in its variants Turbo and Base (Z-Image Team 2025, arXiv 2511.22699)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import CONTROLNET, AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES, Feature
from safelight.families.parts import qwen3, vae
from safelight.families.parts.flux_latents import FLUX_LATENTS, FLUX_VAE, SCALING_FACTOR, SHIFT_FACTOR
from safelight.families.parts.language_model import counts_for_layer_number
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.parts.vae import VAEConfig
from safelight.families.rules import KindRule, rule
from safelight.families.tables import is_architecture, reason_by_component, without_prefix
from safelight.families.zimage import controlnet, transformer
from safelight.families.zimage.controlnet import ZImageControlNetConfig
from safelight.families.zimage.transformer import ZImageConfig
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

TURBO, BASE = "turbo", "base"

_TURBO_SHIFT, _BASE_SHIFT = 3.0, 6.0

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_PADDING = r"(cap|x)_pad_token$"
_WHAT = "a transformer with padding tokens for the image and for the caption"

TEXT_PREFIXES = ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_4b.", "text_encoder.")


_CONTROL_LAYERS = r"control_layers\.0\."


def _recognise_folder(folder: Folder) -> str | None:
    fits = is_architecture(transformer.infer, folder.components.get("transformer"))
    return "a transformer with refiners for the image and for the text" if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of Z-Image")


def _folder_variant(folder: Folder) -> str | None:
    """Tell Turbo from Base by the shift of the scheduler's settings: 3 or 6."""
    return {_TURBO_SHIFT: TURBO, _BASE_SHIFT: BASE}.get(folder.scheduler.get("shift", 0.0))


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, ZImageConfig)
    if isinstance(encoder, Qwen3Config) and net.text_width != encoder.width:
        return f"its transformer reads text {net.text_width} wide, its text encoder returns {encoder.width}"
    if isinstance(auto, VAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    del configs
    yield "transformer", "rope_theta", 256.0
    yield "transformer", "t_scale", 1000.0
    yield "transformer", "norm_eps", 1e-5
    yield "text_encoder", "rms_norm_eps", 1e-6
    yield "text_encoder", "hidden_act", "silu"
    yield "vae", "scaling_factor", SCALING_FACTOR
    yield "vae", "shift_factor", SHIFT_FACTOR


def _left_over(name: str) -> str | None:
    if name.endswith("norm_final.weight"):
        return "a norm without effect"
    return reason_by_component(name, (TEXT_PREFIXES, qwen3.unread_reason))


def _keep(name: str) -> bool:
    inner = without_prefix(name, TEXT_PREFIXES)
    return inner is not None and counts_for_layer_number(inner)


ZIMAGE = Family(
    name="z-image",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            qwen3.infer,
            Qwen3Config(151936, 2560, 9728, 36 - qwen3.UNREAD_LAYERS, 32, 8, 128),
            lora_prefixes=("lora_te_", "lora_te1_"),
            lora_paths=("text_encoders.qwen3_4b.transformer.",),
            tokenizer=qwen3.TOKENIZER,
            most_tokens=509,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            ZImageConfig(16, 3840, 30, 2, 128, 2560),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=transformer.block_of,
            # Its feed-forward layers exceed 65,504: https://github.com/Tongyi-MAI/Z-Image/issues/14.
            overflows_in_fp16=True,
        ),
        Component("vae", Purpose.VAE, ("vae.", "first_stage_model."), vae.infer, FLUX_VAE),
    ),
    architectures=(Qwen3Config, ZImageConfig, VAEConfig, ZImageControlNetConfig),
    latents=FLUX_LATENTS,
    noise=Noise("flow", {"shift": _TURBO_SHIFT}),
    resolution=1024,
    guidance="classifier_free_from_prompt",
    features=PLAIN_TEXT_FEATURES | {Feature.CONTROLNET},
    control_modes=frozenset({"balanced", "unbalanced"}),
    find_controlnet_mismatch=controlnet.find_mismatch,
    adapter_rules=(
        rule(
            CONTROLNET,
            "z-image",
            "an embedder of the picture, and control layers",
            r"control_all_x_embedder\.2-1\.(weight|bias)$",
            _CONTROL_LAYERS,
        ),
    ),
    model_module="safelight.families.zimage.model",
    rules=(
        rule(
            "checkpoint",
            "z-image",
            f"{_WHAT}, and a text encoder",
            _PREFIX + _PADDING,
            r"text_encoders?\.",
        ),
    ),
    part_rules=(
        rule(
            "denoiser",
            "z-image",
            f"{_WHAT}, alone",
            _PREFIX + _PADDING,
        ),
        KindRule("text_encoder", None, "a Qwen3 language model", (qwen3.PATTERN,), (qwen3.VISION,)),
    ),
    single_file_components=(
        SingleFileComponent(
            "text_encoder",
            "",
            "Qwen3 text encoder",
            qwen3.infer,
            qwen3.PATTERN,
            qwen3.unread_reason,
            qwen3.VISION,
        ),
        SingleFileComponent(CONTROLNET, "", "Z-Image ControlNet", controlnet.infer, _CONTROL_LAYERS),
    ),
    separate_parts=True,
    asks_variant=lambda _: True,
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: None,
    variants={
        TURBO: Variant(defaults=Defaults(8, 1.0)),
        BASE: Variant(noise=Noise("flow", {"shift": _BASE_SHIFT}), defaults=Defaults(50, 5.0)),
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=_folder_variant,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    keep=_keep,
    latent_space="flux",
    adapter_signs=AdapterSigns(
        names=re.compile(
            r"(^|[._])(context_refiner|noise_refiner)[._][0-9]"
            r"|layers[._][0-9]+[._](adaLN_modulation|attention[._]to_(q|k|v|out))"
        ),
        declared=frozenset({"z-image", "zimage", "z-image-turbo"}),
    ),
    gguf_architecture="lumina2",
    pipeline_class="ZImagePipeline",
)

FAMILIES = (ZIMAGE,)
