"""Anima (CircleStone Labs and Comfy Org 2026)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from safelight.families.anima import text_conditioner, text_encoder, transformer
from safelight.families.anima.text_conditioner import AnimaConditionerConfig
from safelight.families.anima.text_encoder import Qwen3SmallConfig
from safelight.families.anima.transformer import AnimaConfig
from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES
from safelight.families.parts import qwen3, qwen_vae, t5
from safelight.families.parts.flow_scheduler import require_shift
from safelight.families.parts.qwen_vae import LATENTS_MEAN, LATENTS_STD, QWEN_LATENTS, QWEN_VAE, QwenVAEConfig
from safelight.families.parts.tokens import PATCH
from safelight.families.rules import rule
from safelight.families.tables import is_architecture, reason_by_component
from safelight.families.tokenizer_file import TokenizerFile
from safelight.files.folder import Folder
from safelight.files.header import Header
from safelight.request.adapters import Purpose

SHIFT = 3.0

ROPE_SCALE = (1.0, 4.0, 4.0)
"""Stretches the rotary embedding in the directions of frames, rows and columns."""

PUBLISHED_SIZE = (128, 240, 240)
"""What published settings say of the most latents in the directions of frames, rows and columns. Larger images have the
positions that follow."""

_WIDTH, _TEXT_WIDTH = 2048, 1024
"""Widths of the published transformer, and of the text that it reads."""

ADAPTER = "llm_adapter."
"""What the original's names of the text conditioner begin with, within the transformer's file."""

TEXT_PREFIXES = ("text_encoders.qwen3_06b.transformer.", "text_encoders.qwen3_06b.", "text_encoder.")
VAE_PREFIXES = ("vae.", "first_stage_model.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

CONDITIONER_PREFIXES = (*(f"{prefix}{ADAPTER}" for prefix in PREFIXES), "text_conditioner.")

TEXT_TOKENIZER = TokenizerFile("t5_tokenizer/tokenizer.json", shipped=t5.SHIPPED)
"""The tokenizer of the text conditioner."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_TRANSFORMER = _PREFIX + r"(blocks\.[0-9]+\.adaln_modulation_|transformer_blocks\.[0-9]+\.norm[123]\.linear_1\.)"
_CONDITIONER = rf"({'|'.join(re.escape(one) for one in CONDITIONER_PREFIXES)})(embed|norm|out_proj|blocks\.[0-9]+)\."
_WHAT = "a transformer of Cosmos-Predict2, and an adapter between a language model and it"


def _recognise_folder(folder: Folder) -> str | None:
    fits = is_architecture(transformer.infer, folder.components.get("transformer")) and is_architecture(
        text_conditioner.infer, folder.components.get("text_conditioner")
    )
    return _WHAT if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of Anima")


def _folder_training(folder: Folder) -> Training:
    require_shift(folder, "anima", SHIFT)
    return _FLOW


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    conditioner = configs.get("text_conditioner")
    assert isinstance(net, AnimaConfig)
    if isinstance(conditioner, AnimaConditionerConfig):
        if net.text_width != conditioner.target_width:
            returned = f"its text conditioner returns {conditioner.target_width}"
            return f"its transformer reads text {net.text_width} wide, {returned}"
        if isinstance(encoder, Qwen3SmallConfig) and conditioner.source_width != encoder.width:
            returned = f"its text encoder returns {encoder.width}"
            return f"its text conditioner reads text {conditioner.source_width} wide, {returned}"
    if isinstance(auto, QwenVAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net, conditioner = configs["transformer"], configs["text_conditioner"]
    assert isinstance(net, AnimaConfig)
    assert isinstance(conditioner, AnimaConditionerConfig)
    yield "transformer", "in_channels", net.channels
    yield "transformer", "patch_size", [1, PATCH, PATCH]
    yield "transformer", "rope_scale", list(ROPE_SCALE)
    yield "transformer", "max_size", list(PUBLISHED_SIZE)
    yield "transformer", "concat_padding_mask", True
    yield "transformer", "extra_pos_embed_type", None
    yield "transformer", "use_crossattn_projection", False
    yield "transformer", "img_context_dim_in", None
    yield "text_conditioner", "num_attention_heads", conditioner.width // conditioner.head_size
    yield "text_conditioner", "use_self_attention", True
    yield "text_conditioner", "use_layer_norm", False
    yield "text_conditioner", "min_sequence_length", text_conditioner.TOKENS
    yield "text_encoder", "rms_norm_eps", 1e-6
    yield "vae", "latents_mean", list(LATENTS_MEAN)
    yield "vae", "latents_std", list(LATENTS_STD)


def _left_over(name: str) -> str | None:
    found = reason_by_component(
        name,
        (TEXT_PREFIXES, _text_reason),
        (VAE_PREFIXES, qwen_vae.unread_reason),
        (CONDITIONER_PREFIXES, text_conditioner.unread_reason),
    )
    return found or reason_by_component(name, (PREFIXES, transformer.unread_reason))


def _text_reason(name: str) -> str | None:
    return "not used" if re.match(text_encoder.UNREAD, name) else None


def _reads_its_text(header: Header) -> bool:
    """Return whether an adapter is for cross-attention of this width over text of this width."""
    widths = {"to_q": _WIDTH, "to_k": _TEXT_WIDTH, "to_v": _TEXT_WIDTH}
    reads = re.compile(r"(^|transformer[._])transformer_blocks[._][0-9]+[._]attn2[._](to_[qkv])\.lora_(A|down)\.")
    found = [(match[2], info) for name, info in header.tensors.items() if (match := reads.search(name)) is not None]
    return bool(found) and all(info.shape[-1:] == (widths[part],) for part, info in found)


ANIMA = Family(
    name="anima",
    components=(
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            text_encoder.infer,
            Qwen3SmallConfig(151936, 1024, 3072, 28, 16, 8, 128),
            lora_prefixes=("lora_te_", "lora_te1_"),
            lora_paths=("text_encoders.qwen3_06b.transformer.",),
            tokenizer=qwen3.TOKENIZER,
            most_tokens=512,
        ),
        Component(
            "text_conditioner",
            Purpose.TEXT_ENCODER,
            CONDITIONER_PREFIXES,
            text_conditioner.infer,
            AnimaConditionerConfig(32128, 1024, 1024, 1024, 4096, 6, 64),
            lora_prefixes=("lora_unet_llm_adapter_", "lora_transformer_llm_adapter_", "lycoris_llm_adapter_"),
            lora_paths=(f"diffusion_model.{ADAPTER}", f"transformer.{ADAPTER}", f"base_model.model.{ADAPTER}", ADAPTER),
            tokenizer=TEXT_TOKENIZER,
            most_tokens=511,
            reads="text_encoder",
            found_in="the file of the transformer",
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            AnimaConfig(16, _WIDTH, 28, 8192, 128, _TEXT_WIDTH, 256),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=transformer.block_of,
            # What its blocks add to exceeds 65,504: ComfyUI's comfy/ldm/cosmos/predict2.py keeps it in fp32.
            overflows_in_fp16=True,
        ),
        Component("vae", Purpose.VAE, VAE_PREFIXES, qwen_vae.infer, QWEN_VAE),
    ),
    architectures=(Qwen3SmallConfig, AnimaConditionerConfig, AnimaConfig, QwenVAEConfig),
    latents=QWEN_LATENTS,
    noise=Noise("flow", {"shift": SHIFT}),
    resolution=1024,
    guidance="classifier_free",
    features=PLAIN_TEXT_FEATURES,
    model_module="safelight.families.anima.model",
    rules=(
        rule("checkpoint", "anima", f"{_WHAT}, and a text encoder", _TRANSFORMER, _CONDITIONER, r"text_encoders?\."),
    ),
    part_rules=(rule("denoiser", "anima", f"{_WHAT}, alone", _TRANSFORMER, _CONDITIONER),),
    single_file_components=(
        SingleFileComponent(
            "text_encoder",
            "",
            "Qwen3-0.6B text encoder",
            text_encoder.infer,
            qwen3.PATTERN,
            _text_reason,
            qwen3.VISION,
        ),
    ),
    separate_parts=True,
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: "text-to-image",
    variants={"text-to-image": Variant(defaults=Defaults(30, 4.0), draws_latents=False)},
    recognise_folder=_recognise_folder,
    detect_folder_training=_folder_training,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    # Each prompt has a call of its own in diffusers' pipeline. Rows that are computed together have other last bits.
    rows_together=False,
    latent_space="qwen",
    adapter_signs=AdapterSigns(
        names=re.compile(
            r"^(diffusion_model\.|transformer\.|base_model\.model\.|lora_(unet|transformer)_|lycoris_)?"
            r"((llm_adapter|text_conditioner)[._]"
            r"|blocks[._][0-9]+[._](adaln_modulation_|mlp[._]layer[12]|(self|cross)_attn[._]([qkv]|output)_proj)"
            r"|transformer_blocks[._][0-9]+[._]norm[123][._]linear_[12])"
        ),
        shapes=_reads_its_text,
        declared=frozenset({"anima"}),
    ),
    gguf_architecture="cosmos",
    pipeline_class="AnimaModularPipeline",
    export_problem="diffusers has it as a modular pipeline only, whose index Safelight does not write yet",
)

FAMILIES = (ANIMA,)
