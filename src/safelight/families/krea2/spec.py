"""Krea 2, in its variants Turbo and Raw (Krea AI 2026)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES
from safelight.families.krea2 import transformer
from safelight.families.krea2.transformer import Krea2Config
from safelight.families.parts import qwen3, qwen3_vl, qwen_vae
from safelight.families.parts.language_model import counts_for_layer_number
from safelight.families.parts.qwen3_vl import Qwen3VLConfig
from safelight.families.parts.qwen_vae import LATENTS_MEAN, LATENTS_STD, QWEN_LATENTS, QWEN_VAE, QwenVAEConfig
from safelight.families.parts.tokens import PATCH, shift_by_size
from safelight.families.rules import rule
from safelight.families.tables import is_architecture, reason_by_component, without_prefix
from safelight.files.folder import Folder
from safelight.files.header import Header
from safelight.request.adapters import Purpose

TURBO, RAW = "turbo", "raw"

FIRST_LAYER, LAYER_STEP = 2, 3
"""The transformer reads the text encoder's hidden states after every third layer, from the second on: of 36 layers,
12."""

ROPE_THETA, NORM_EPS = 1000.0, 1e-5

TEXT_PREFIXES = ("text_encoders.qwen3vl_4b.transformer.", "text_encoders.qwen3vl_4b.", "text_encoder.")
VAE_PREFIXES = ("vae.", "first_stage_model.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

_FEWEST_TOKENS, _LEAST_MU = 256, 0.5
_MOST_TOKENS, _MOST_MU = 6400, 1.15

_FUSION = rf"({'|'.join(re.escape(one) for one in PREFIXES)})(txtfusion|text_fusion)\."
_WHAT = "a transformer that fuses layers of the text encoder"

_WIDTH = 6144
"""Width of the published transformers. No other family has it."""


def text_layers(count: int) -> tuple[int, ...]:
    """Return the numbers, from 1, of the layers that the transformer reads, of a text encoder with ``count``."""
    return tuple(range(FIRST_LAYER, count + 1, LAYER_STEP))


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the frame, the row and the column.

    Of the published 128 they are 32, 48 and 48.
    """
    frame = head_size // 4
    side = (head_size - frame) // 2
    return frame, side, side


mu = shift_by_size((_FEWEST_TOKENS, _LEAST_MU), (_MOST_TOKENS, _MOST_MU))
"""The shift of the noise levels, by the number of tokens."""


def _turbo_mu(tokens: int, steps: int) -> float:
    del tokens, steps
    return _MOST_MU


def _recognise_folder(folder: Folder) -> str | None:
    return _WHAT if is_architecture(transformer.infer, folder.components.get("transformer")) else None


_FLOW = Training("flow", False, "a rectified flow, as all of Krea 2")


def _folder_variant(folder: Folder) -> str:
    """Tell Turbo from Raw by the pipeline's setting. Their tensors have the same names and shapes."""
    return TURBO if folder.index.get("is_distilled") is True else RAW


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, Krea2Config)
    if isinstance(encoder, Qwen3VLConfig):
        layers = len(text_layers(encoder.layers))
        if (net.text_width, net.text_layers) != (encoder.width, layers):
            reads = f"{net.text_layers} layers of text {net.text_width} wide"
            return f"its transformer reads {reads}, its text encoder returns {layers} layers {encoder.width} wide"
    if isinstance(auto, QwenVAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net, encoder = configs["transformer"], configs["text_encoder"]
    assert isinstance(net, Krea2Config)
    yield "", "patch_size", PATCH
    yield "", "text_encoder_select_layers", list(text_layers(encoder.encoder_layers))
    for key, value in (("base_image_seq_len", _FEWEST_TOKENS), ("max_image_seq_len", _MOST_TOKENS)):
        yield "scheduler", key, value
    yield "scheduler", "base_shift", _LEAST_MU
    yield "scheduler", "max_shift", _MOST_MU
    yield "transformer", "axes_dims_rope", list(axes(net.head_size))
    yield "transformer", "rope_theta", ROPE_THETA
    yield "transformer", "norm_eps", NORM_EPS
    yield "vae", "latents_mean", list(LATENTS_MEAN)
    yield "vae", "latents_std", list(LATENTS_STD)


def _left_over(name: str) -> str | None:
    return reason_by_component(name, (TEXT_PREFIXES, qwen3_vl.unread_reason), (VAE_PREFIXES, qwen_vae.unread_reason))


def _keep(name: str) -> bool:
    inner = without_prefix(name, TEXT_PREFIXES)
    return inner is not None and counts_for_layer_number(inner)


def _is_wide(header: Header) -> bool:
    """Return whether an adapter is for a transformer as wide as this one."""
    reads = re.compile(r"attn[._](to_q|to_gate|wq|gate)\.lora_(A|down)\.")
    return any(reads.search(name) and info.shape[-1:] == (_WIDTH,) for name, info in header.tensors.items())


KREA2 = Family(
    name="krea-2",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            qwen3_vl.infer,
            Qwen3VLConfig(151936, 2560, 9728, 36 - qwen3.UNREAD_LAYERS, 32, 8, 128),
            lora_prefixes=("lora_te_", "lora_te1_"),
            lora_paths=("text_encoders.qwen3vl_4b.transformer.",),
            tokenizer=qwen3.TOKENIZER,
            most_tokens=507,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            Krea2Config(16, _WIDTH, 28, 128, 12, 16384, 256, 2560, 12, 128, 20, 6912, 2, 2),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=transformer.block_of,
        ),
        Component("vae", Purpose.VAE, VAE_PREFIXES, qwen_vae.infer, QWEN_VAE),
    ),
    architectures=(Qwen3VLConfig, Krea2Config, QwenVAEConfig),
    latents=QWEN_LATENTS,
    noise=Noise("flow", mu=mu),
    resolution=1024,
    guidance="classifier_free_from_prompt",
    features=PLAIN_TEXT_FEATURES,
    model_module="safelight.families.krea2.model",
    rules=(rule("checkpoint", "krea-2", f"{_WHAT}, and a text encoder", _FUSION, r"text_encoders?\."),),
    part_rules=(
        rule("denoiser", "krea-2", f"{_WHAT}, alone", _FUSION),
        rule("text_encoder", None, "a Qwen3-VL language model with its vision tower", qwen3.PATTERN, qwen3_vl.PATTERN),
    ),
    single_file_components=(
        SingleFileComponent(
            "text_encoder",
            "",
            "Qwen3-VL text encoder",
            qwen3_vl.infer,
            qwen3_vl.PATTERN,
            qwen3_vl.unread_reason,
        ),
    ),
    separate_parts=True,
    asks_variant=lambda _: True,
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: None,
    variants={
        TURBO: Variant(noise=Noise("flow", mu=_turbo_mu), defaults=Defaults(8, 1.0), index={"is_distilled": True}),
        RAW: Variant(defaults=Defaults(28, 5.5), index={"is_distilled": False}),
    },
    declared_variants={"krea-2-turbo": TURBO, "krea-2-raw": RAW},
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=_folder_variant,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    keep=_keep,
    # Each prompt has a call of its own in diffusers' pipeline. Rows that are computed together have other last bits.
    rows_together=False,
    latent_space="qwen",
    adapter_signs=AdapterSigns(
        names=re.compile(r"txtfusion|text_fusion|blocks[._][0-9]+[._](attn[._](w[qkvo]|to_gate)|mlp[._]up|ff[._]up)\b"),
        shapes=_is_wide,
        declared=frozenset({"krea-2", "krea2", "krea-2-turbo", "krea-2-raw"}),
    ),
    gguf_architecture="krea2",
    pipeline_class="Krea2Pipeline",
    export_problem="Safelight does not write the settings of its scheduler and its tokenizer yet",
)

FAMILIES = (KREA2,)
