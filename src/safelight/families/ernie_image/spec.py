"""ERNIE-Image, in its variants Turbo and Base (Baidu 2026). Its prompt enhancer is not run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.ernie_image import transformer
from safelight.families.ernie_image.transformer import ErnieImageConfig
from safelight.families.family import AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES
from safelight.families.parts import flux2_vae, ministral3
from safelight.families.parts.flow_scheduler import require_shift
from safelight.families.parts.flux2_vae import FLUX2_LATENTS, FLUX2_VAE, Flux2VAEConfig
from safelight.families.parts.language_model import counts_for_layer_number
from safelight.families.parts.ministral3 import Ministral3Config
from safelight.families.rules import KindRule, rule
from safelight.families.tables import is_architecture, reason_by_component, without_prefix
from safelight.families.tokenizer_file import TokenizerFile
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

TURBO, BASE = "turbo", "base"

UNREAD_LAYERS = 1
"""The transformer reads the text encoder's last layer but one (diffusers' ``hidden_states[-2]``)."""

SHIFT = 4.0
ROPE_THETA, NORM_EPS = 256, 1e-6

TEXT_PREFIXES = ("text_encoders.ministral3_3b.transformer.", "text_encoders.ministral3_3b.", "text_encoder.")
VAE_PREFIXES = ("vae.", "first_stage_model.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

TOKENIZER = TokenizerFile("tokenizer/tokenizer.json", "baidu/ERNIE-Image on Hugging Face")

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_NORM = _PREFIX + r"layers\.[0-9]+\.adaLN_sa_ln\."
_WHAT = "a transformer whose blocks share one modulation for attention and feed-forward layers"

_infer_text = partial(ministral3.infer, unread=UNREAD_LAYERS)


def axes(head_size: int) -> tuple[int, int, int]:
    """Return how many components of a head turn with the text's position, the row and the column.

    Of the published 128 they are 32, 48 and 48.
    """
    text = head_size // 4
    side = (head_size - text) // 2
    return text, side, side


def _recognise_folder(folder: Folder) -> str | None:
    fits = is_architecture(transformer.infer, folder.components.get("transformer"))
    return _WHAT if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of ERNIE-Image")


def _folder_training(folder: Folder) -> Training:
    require_shift(folder, "ernie-image", SHIFT)
    return _FLOW


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, ErnieImageConfig)
    if isinstance(encoder, Ministral3Config) and net.text_width != encoder.width:
        return f"its transformer reads text {net.text_width} wide, its text encoder returns {encoder.width}"
    if isinstance(auto, Flux2VAEConfig) and auto.channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net = configs["transformer"]
    assert isinstance(net, ErnieImageConfig)
    yield "transformer", "rope_axes_dim", list(axes(net.head_size))
    yield "transformer", "rope_theta", ROPE_THETA
    yield "transformer", "eps", NORM_EPS
    yield "transformer", "patch_size", 1
    yield from ministral3.folder_settings("text_encoder")
    yield "vae", "patch_size", [flux2_vae.PATCH] * 2


def _left_over(name: str) -> str | None:
    return reason_by_component(name, (TEXT_PREFIXES, ministral3.unread_reason), (VAE_PREFIXES, flux2_vae.unread_reason))


def _keep(name: str) -> bool:
    inner = without_prefix(name, TEXT_PREFIXES)
    return inner is not None and counts_for_layer_number(inner)


ERNIE_IMAGE = Family(
    name="ernie-image",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            _infer_text,
            Ministral3Config(131072, 3072, 9216, 26 - UNREAD_LAYERS, 32, 8),
            tokenizer=TOKENIZER,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            ErnieImageConfig(128, 4096, 12288, 36, 128, 3072),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=transformer.block_of,
        ),
        Component("vae", Purpose.VAE, VAE_PREFIXES, flux2_vae.infer, FLUX2_VAE),
    ),
    architectures=(Ministral3Config, ErnieImageConfig, Flux2VAEConfig),
    latents=FLUX2_LATENTS,
    noise=Noise("flow", {"shift": SHIFT}),
    resolution=1024,
    guidance="classifier_free",
    features=PLAIN_TEXT_FEATURES,
    model_module="safelight.families.ernie_image.model",
    rules=(rule("checkpoint", "ernie-image", f"{_WHAT}, and a text encoder", _NORM, r"text_encoders?\."),),
    part_rules=(
        rule("denoiser", "ernie-image", f"{_WHAT}, alone", _NORM),
        KindRule(
            "text_encoder",
            None,
            "a Ministral 3 language model with what sees images",
            (r"(model\.|language_model\.)*layers\.0\.self_attn\.q_proj\.", ministral3.VISION),
            (r"(model\.|language_model\.)*layers\.0\.self_attn\.(q_norm|q_proj\.bias)",),
        ),
    ),
    single_file_components=(
        SingleFileComponent(
            "text_encoder",
            "",
            "Ministral 3 text encoder",
            _infer_text,
            ministral3.VISION,
            ministral3.unread_reason,
        ),
    ),
    separate_parts=True,
    asks_variant=lambda _: True,
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: None,
    variants={TURBO: Variant(defaults=Defaults(8, 1.0)), BASE: Variant(defaults=Defaults(50, 4.0))},
    recognise_folder=_recognise_folder,
    detect_folder_training=_folder_training,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    keep=_keep,
    latent_space="flux2",
    adapter_signs=AdapterSigns(
        names=re.compile(r"layers[._][0-9]+[._](self_attention[._]to_|mlp[._]linear_fc2)"),
        declared=frozenset({"ernie-image", "ernie_image"}),
    ),
    pipeline_class="ErnieImagePipeline",
    empty_pipeline_components=("pe", "pe_tokenizer"),
    export_problem=ministral3.EXPORT_PROBLEM,
)

FAMILIES = (ERNIE_IMAGE,)
