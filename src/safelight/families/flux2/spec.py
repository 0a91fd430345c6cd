"""FLUX.2 klein, with 4 or 9 billion weights, distilled and base (Black Forest Labs 2026)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES
from safelight.families.flux2 import transformer
from safelight.families.flux2.transformer import Flux2Config
from safelight.families.parts import flux2_vae, flux_adapters, qwen3
from safelight.families.parts.flux2_vae import FLUX2_LATENTS, FLUX2_VAE, NORM_EPSILON, Flux2VAEConfig
from safelight.families.parts.language_model import counts_for_layer_number, is_in_layer_after
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.references import References, Size
from safelight.families.rules import KindRule
from safelight.families.tables import is_architecture, reason_by_component, without_prefix
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

DISTILLED, BASE = "distilled", "base"

TEXT_LAYERS = (9, 18, 27)
"""The transformer reads the text encoder's hidden states after these layers (of 36), side by side."""

ROPE_THETA, NORM_EPS = 2000, 1e-6

MOST_REFERENCE_PIXELS = 1024 * 1024
"""A larger reference image is made smaller."""

REFERENCE_MULTIPLE = FLUX2_LATENTS.multiple

_PIPELINES = frozenset({"Flux2KleinPipeline", "Flux2KleinInpaintPipeline"})

TEXT_PREFIXES = (
    "text_encoders.qwen3_4b.transformer.",
    "text_encoders.qwen3_4b.",
    "text_encoders.qwen3_8b.transformer.",
    "text_encoders.qwen3_8b.",
    "text_encoder.",
)
VAE_PREFIXES = ("vae.", "first_stage_model.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_SHARED = _PREFIX + r"(double_stream_modulation_(img|txt)|single_stream_modulation)\."
_GUIDANCE = _PREFIX + r"(guidance_in|time_guidance_embed\.guidance_embedder)\."
_WHAT = "a transformer whose blocks share their modulation, without a guidance scale as an input"


_ADAPTER_NAMES = (
    r"to_qkv_mlp_proj|(double|single)_stream_modulation|time_guidance_embed[._]|time_in[._](in|out)_layer"
    r"|(^|[._])transformer_blocks[._][0-9]+[._]ff(_context)?[._]linear_(in|out)"
    r"|single_transformer_blocks[._][0-9]+[._]attn[._]to_out"
)
"""Names of modules in adapters that few other families have."""


def axes(head_size: int) -> tuple[int, int, int, int]:
    """Return how many components of a head turn with each position: image number, row, column, place in the text."""
    each = head_size // 4
    return each, each, each, each


def mu(tokens: int, steps: int) -> float:
    """Return the logarithm of the shift of the noise levels, as diffusers' ``compute_empirical_mu``.

    It is linear in the number of tokens for 10 steps and for 200 steps, and linear in the steps between them.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def reference_size(size: Size) -> Size:
    """Return the size in which diffusers' pipeline encodes a reference image: smaller if it has over 1024 by 1024
    pixels, and then cropped to multiples of :data:`REFERENCE_MULTIPLE`."""
    width, height = shrunk(size)
    return width // REFERENCE_MULTIPLE * REFERENCE_MULTIPLE, height // REFERENCE_MULTIPLE * REFERENCE_MULTIPLE


def shrunk(size: Size) -> Size:
    """Return the size of a reference image before it is cropped."""
    width, height = size
    if width * height <= MOST_REFERENCE_PIXELS:
        return size
    scale = math.sqrt(MOST_REFERENCE_PIXELS / (width * height))
    return int(width * scale), int(height * scale)


def _recognise_folder(folder: Folder) -> str | None:
    fits = folder.pipeline in _PIPELINES and is_architecture(transformer.infer, folder.components.get("transformer"))
    return _WHAT if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of FLUX.2")


def _folder_variant(folder: Folder) -> str:
    """Tell distilled from base by the pipeline's setting. Their tensors have the same names and shapes."""
    return DISTILLED if folder.index.get("is_distilled") is True else BASE


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, Flux2Config)
    if isinstance(encoder, Qwen3Config):
        if encoder.layers < TEXT_LAYERS[-1]:
            return f"its transformer reads the text encoder's layer {TEXT_LAYERS[-1]}, which has only {encoder.layers}"
        if net.text_width != encoder.width * len(TEXT_LAYERS):
            read = f"{len(TEXT_LAYERS)} layers of {encoder.width}"
            return f"its transformer reads text {net.text_width} wide, its text encoder returns {read}"
    if isinstance(auto, Flux2VAEConfig) and auto.channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net = configs["transformer"]
    assert isinstance(net, Flux2Config)
    yield "transformer", "axes_dims_rope", list(axes(net.head_size))
    yield "transformer", "rope_theta", ROPE_THETA
    yield "transformer", "eps", NORM_EPS
    yield "transformer", "patch_size", 1
    yield "text_encoder", "rms_norm_eps", 1e-6
    yield "text_encoder", "hidden_act", "silu"
    yield "vae", "batch_norm_eps", NORM_EPSILON
    yield "vae", "patch_size", [flux2_vae.PATCH] * 2


def _left_over(name: str) -> str | None:
    return reason_by_component(name, (TEXT_PREFIXES, qwen3.unread_reason), (VAE_PREFIXES, flux2_vae.unread_reason))


def _keep(name: str) -> bool:
    inner = without_prefix(name, TEXT_PREFIXES)
    return inner is not None and counts_for_layer_number(inner)


_REFERENCES = References(reference_size, least_side=64, most_ratio=8.0)
"""The bounds are those of diffusers' ``Flux2ImageProcessor``."""

FLUX2_KLEIN = Family(
    name="flux2-klein",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            qwen3.infer,
            Qwen3Config(151936, 2560, 9728, 36 - qwen3.UNREAD_LAYERS, 32, 8, 128),
            # The layers after the 27th are in the table because Z-Image reads them.
            is_unread=partial(is_in_layer_after, after=TEXT_LAYERS[-1]),
            tokenizer=qwen3.TOKENIZER,
            most_tokens=509,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            Flux2Config(128, 3072, 5, 20, 128, 7680),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            adapter_sources=transformer.adapter_sources,
            block_of=transformer.block_of,
        ),
        Component("vae", Purpose.VAE, VAE_PREFIXES, flux2_vae.infer, FLUX2_VAE),
    ),
    architectures=(Qwen3Config, Flux2Config, Flux2VAEConfig),
    latents=FLUX2_LATENTS,
    noise=Noise("flow", {"shift": 3.0}, mu),
    resolution=1024,
    guidance="classifier_free",
    features=PLAIN_TEXT_FEATURES,
    model_module="safelight.families.flux2.model",
    rules=(
        KindRule(
            "checkpoint", "flux2-klein", f"{_WHAT}, and a text encoder", (_SHARED, r"text_encoders?\."), (_GUIDANCE,)
        ),
    ),
    part_rules=(KindRule("denoiser", "flux2-klein", f"{_WHAT}, alone", (_SHARED,), (_GUIDANCE,)),),
    single_file_components=(
        SingleFileComponent(
            "vae", "", "FLUX.2 VAE", flux2_vae.infer, r"bn\.running_(mean|var)$", flux2_vae.unread_reason
        ),
    ),
    separate_parts=True,
    detect_training=lambda _: _FLOW,
    asks_variant=lambda _: True,
    detect_variant=lambda _: None,
    variants={
        DISTILLED: Variant(
            guidance="none", defaults=Defaults(4, 1.0), references=_REFERENCES, index={"is_distilled": True}
        ),
        BASE: Variant(defaults=Defaults(50, 4.0), references=_REFERENCES),
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=_folder_variant,
    declared_variants={
        f"flux{mark}2-klein-{name}{size}": variant
        for mark in "-."
        for name, variant in (("", DISTILLED), ("base-", BASE))
        for size in ("4b", "9b")
    },
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    keep=_keep,
    # Each prompt has a call of its own in diffusers' pipeline. Rows that are computed together have other last bits.
    rows_together=False,
    latent_space="flux2",
    published={
        "flux2-klein-4b": {},
        "flux2-klein-9b": {
            "text_encoder": Qwen3Config(151936, 4096, 12288, 36 - qwen3.UNREAD_LAYERS, 32, 8, 128),
            "transformer": Flux2Config(128, 4096, 8, 24, 128, 12288),
        },
    },
    adapter_signs=AdapterSigns(
        names=re.compile(_ADAPTER_NAMES),
        shapes=flux_adapters.may_change_klein,
        declared=frozenset({"flux2_klein_4b", "flux2_klein_9b", "flux-2-klein-4b", "flux-2-klein-9b"}),
    ),
    gguf_architecture="flux",
    pipeline_class="Flux2KleinPipeline",
    pipeline_settings=lambda variant: {"is_distilled": variant == DISTILLED},
)

FAMILIES = (FLUX2_KLEIN,)
