"""Qwen-Image, August and December 2025 (2512) (Qwen Team 2025, arXiv 2508.02324), and Qwen-Image-Edit.

Edit is of August 2025 and sees one picture; 2509 and 2511 see several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import CONTROLNET, AdapterSigns, Defaults, Family, Noise, Training, Variant
from safelight.families.features import PLAIN_TEXT_FEATURES, Feature
from safelight.families.parts import qwen25, qwen25_vision, qwen_vae
from safelight.families.parts.qwen25 import Qwen25Config
from safelight.families.parts.qwen25_vision import Qwen25VisionConfig
from safelight.families.parts.qwen_vae import LATENTS_MEAN, LATENTS_STD, QWEN_LATENTS, QWEN_VAE, QwenVAEConfig
from safelight.families.parts.tokens import PATCH, axes, shift_by_size
from safelight.families.qwen_image import controlnet, transformer
from safelight.families.qwen_image.controlnet import QwenImageControlNetConfig
from safelight.families.qwen_image.transformer import ZERO_MARKER, QwenImageConfig
from safelight.families.references import References, Size
from safelight.families.rules import rule
from safelight.families.tables import is_architecture, reason_by_component
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

TEXT_TO_IMAGE, EDIT, EDIT_2509, EDIT_2511 = "text-to-image", "edit", "edit-2509", "edit-2511"

EDITING = frozenset({EDIT, EDIT_2509, EDIT_2511})
"""The variants with reference images."""

CONDITION_PIXELS, REFERENCE_PIXELS = 384 * 384, 1024 * 1024
"""About how many pixels of a reference image the vision encoder and the VAE see, in diffusers'
``QwenImageEditPlusPipeline``. Both of ``QwenImageEditPipeline`` see the second number."""

SIDE_MULTIPLE = 32
"""Pixels by which the sides of these pictures can be divided."""

MOST_REFERENCES = 3
"""How many pictures 2509 and 2511 were made for."""

TEXT_PREFIXES = ("text_encoders.qwen25_7b.transformer.", "text_encoders.qwen25_7b.", "text_encoder.")
VAE_PREFIXES = ("vae.", "first_stage_model.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
"""What the names of the transformer's tensors begin with."""

_PIPELINES: Mapping[str, str] = {
    **dict.fromkeys(("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"), TEXT_TO_IMAGE),
    **dict.fromkeys(("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"), EDIT),
    "QwenImageEditPlusPipeline": EDIT_2509,
}
"""The variant of a folder by its pipeline. A setting of the transformer tells 2511 from 2509."""

_FEWEST_TOKENS, _LEAST_MU = 256, 0.5
_MOST_TOKENS, _MOST_MU = 8192, 0.9

SCHEDULE = {
    "base_image_seq_len": _FEWEST_TOKENS,
    "base_shift": _LEAST_MU,
    "max_image_seq_len": _MOST_TOKENS,
    "max_shift": _MOST_MU,
    "shift_terminal": 0.02,
}
"""The published settings of the scheduler. The last step begins at the noise level ``shift_terminal``."""

_PREFIX = rf"({'|'.join(re.escape(one) for one in PREFIXES)})"
_NORM, _MODULATION = _PREFIX + r"txt_norm\.weight$", _PREFIX + r"transformer_blocks\.0\.img_mod\.1\."
_CONTROL_BLOCKS = r"transformer_blocks\.0\.img_mod\.1\."
_WHAT = "a norm of the text, and blocks that each modulate image and text"


mu = shift_by_size((_FEWEST_TOKENS, _LEAST_MU), (_MOST_TOKENS, _MOST_MU))
"""The shift of the noise levels, by the number of tokens."""


def reference_size(size: Size) -> Size:
    """Return the size in which the VAE encodes a picture, and in which an Edit without a size draws."""
    return _scaled(size, REFERENCE_PIXELS)


def condition_size(size: Size) -> Size:
    """Return the size in which the vision encoder of 2509 and 2511 sees a picture."""
    return _scaled(size, CONDITION_PIXELS)


def _scaled(size: Size, pixels: int) -> Size:
    """Return a size of about so many pixels with the ratio of ``size``, as diffusers' ``calculate_dimensions``."""
    ratio = size[0] / size[1]
    width = math.sqrt(pixels * ratio)
    height = width / ratio
    return round(width / SIDE_MULTIPLE) * SIDE_MULTIPLE, round(height / SIDE_MULTIPLE) * SIDE_MULTIPLE


def _recognise_folder(folder: Folder) -> str | None:
    fits = folder.pipeline in _PIPELINES and is_architecture(transformer.infer, folder.components.get("transformer"))
    return f"a transformer with {_WHAT}" if fits else None


_FLOW = Training("flow", False, "a rectified flow, as all of Qwen-Image")


def _folder_variant(folder: Folder) -> str | None:
    found = _PIPELINES.get(folder.pipeline)
    zero = folder.settings_of("transformer").get("zero_cond_t") is True
    return EDIT_2511 if zero and found == EDIT_2509 else found


def _has_marker(configs: Mapping[str, Config]) -> bool:
    net = configs["transformer"]
    return isinstance(net, QwenImageConfig) and net.zero_reference_time


def _find_mismatch(configs: Mapping[str, Config]) -> str | None:
    net, encoder, auto = configs["transformer"], configs.get("text_encoder"), configs.get("vae")
    assert isinstance(net, QwenImageConfig)
    eyes = configs.get("vision_encoder")
    if isinstance(encoder, Qwen25Config) and isinstance(eyes, Qwen25VisionConfig) and eyes.returned != encoder.width:
        return f"its vision encoder returns {eyes.returned} values, its text encoder reads {encoder.width}"
    if isinstance(encoder, Qwen25Config) and net.text_width != encoder.width:
        return f"its transformer reads text {net.text_width} wide, its text encoder returns {encoder.width}"
    if isinstance(auto, QwenVAEConfig) and auto.latent_channels != net.channels:
        return f"its transformer has latents of {net.channels} channels, its VAE of {auto.latent_channels}"
    return None


def _folder_settings(configs: Mapping[str, Config]) -> Iterable[tuple[str, str, object]]:
    net = configs["transformer"]
    assert isinstance(net, QwenImageConfig)
    yield "transformer", "axes_dims_rope", list(axes(net.head_size))
    yield "transformer", "guidance_embeds", False
    yield "transformer", "patch_size", PATCH
    yield "transformer", "zero_cond_t", net.zero_reference_time
    yield "transformer", "use_layer3d_rope", False
    yield "text_encoder", "hidden_act", "silu"
    yield "text_encoder", "rms_norm_eps", 1e-6
    yield "text_encoder", "use_sliding_window", False
    eyes = configs.get("vision_encoder")
    if isinstance(eyes, Qwen25VisionConfig):
        yield "text_encoder", "vision_config.num_heads", eyes.heads
        yield "text_encoder", "vision_config.fullatt_block_indexes", eyes.full_attention_blocks
        yield "text_encoder", "vision_config.window_size", qwen25_vision.WINDOW
        yield "text_encoder", "vision_config.hidden_act", "silu"
    yield "vae", "latents_mean", list(LATENTS_MEAN)
    yield "vae", "latents_std", list(LATENTS_STD)


def _left_over(name: str) -> str | None:
    if name.endswith(ZERO_MARKER):
        return "says how reference images are modulated"
    return reason_by_component(name, (TEXT_PREFIXES, qwen25.unread_reason), (VAE_PREFIXES, qwen_vae.unread_reason))


def _edit(most: int, vision_size: Callable[[Size], Size], pipeline: str, zero_reference_time: bool) -> Variant:
    return Variant(
        defaults=Defaults(40, 4.0),
        references=References(
            reference_size,
            most=most,
            least=1,
            most_ratio=qwen25_vision.MOST_RATIO,
            vision_size=vision_size,
            sets_size=-1,
        ),
        index={"_class_name": pipeline},
        settings={"transformer": {"zero_reference_time": zero_reference_time}},
        export_problem="its text encoder and its vision encoder would have to be joined to one module, which is not "
        "supported yet",
    )


QWEN_IMAGE = Family(
    name="qwen-image",
    components=(
        Component(
            "vision_encoder",
            Purpose.VISION_ENCODER,
            TEXT_PREFIXES,
            qwen25_vision.infer,
            Qwen25VisionConfig(1280, 3420, 32, 3584),
            overflows_in_fp16=True,
            variants=EDITING,
            within="text_encoder",
            found_in="a file of the text encoder with tensors named visual.*",
        ),
        Component(
            "text_encoder",
            Purpose.TEXT_ENCODER,
            TEXT_PREFIXES,
            qwen25.infer,
            Qwen25Config(152064, 3584, 18944, 28, 28, 4),
            overflows_in_fp16=True,
            tokenizer=qwen25.TOKENIZER,
            most_tokens=512,
        ),
        Component(
            "transformer",
            Purpose.DENOISER,
            PREFIXES,
            transformer.infer,
            QwenImageConfig(64, 16, 3072, 60, 128, 3584),
            lora_prefixes=("lora_unet_", "lora_transformer_", "lycoris_"),
            lora_paths=("diffusion_model.", "transformer."),
            block_of=transformer.block_of,
            # Its blocks exceed 65,504: https://github.com/Comfy-Org/ComfyUI/issues/10751.
            overflows_in_fp16=True,
        ),
        Component("vae", Purpose.VAE, VAE_PREFIXES, qwen_vae.infer, QWEN_VAE),
    ),
    architectures=(Qwen25Config, Qwen25VisionConfig, QwenImageConfig, QwenVAEConfig, QwenImageControlNetConfig),
    latents=QWEN_LATENTS,
    noise=Noise("flow", SCHEDULE, mu),
    resolution=1328,
    guidance="classifier_free_same_norm",
    features=PLAIN_TEXT_FEATURES | {Feature.CONTROLNET},
    control_modes=frozenset({"balanced", "unbalanced"}),
    control_reads_prompt_only=True,
    find_controlnet_mismatch=controlnet.find_mismatch,
    model_module="safelight.families.qwen_image.model",
    rules=(rule("checkpoint", "qwen-image", f"{_WHAT}, and a text encoder", _NORM, _MODULATION, r"text_encoders?\."),),
    adapter_rules=(
        rule(
            "blockwise_controlnet",
            "qwen-image",
            "blocks that each read the picture and the transformer (DiffSynth's blockwise ControlNet)",
            r"controlnet_blocks\.0\.y_rms\.weight$",
        ),
        rule(
            CONTROLNET,
            "qwen-image",
            "an input for a picture, and blocks that each modulate image and text",
            r"controlnet_(x_embedder|blocks\.0)\.(weight|bias)$",
            _CONTROL_BLOCKS,
        ),
    ),
    part_rules=(
        rule("denoiser", "qwen-image", f"{_WHAT}, alone", _NORM, _MODULATION),
        rule("text_encoder", None, "a Qwen2.5 language model", qwen25.PATTERN),
        rule("vae", None, "Wan's encoder and decoder to and from latents", qwen_vae.PATTERN),
    ),
    single_file_components=(
        SingleFileComponent(
            "text_encoder", "", "Qwen2.5 text encoder", qwen25.infer, qwen25.PATTERN, qwen25.unread_reason
        ),
        SingleFileComponent(
            "text_encoder",
            "",
            "Qwen2.5-VL vision encoder",
            qwen25_vision.infer,
            qwen25_vision.PATTERN,
            role="vision_encoder",
        ),
        SingleFileComponent("vae", "", "VAE of Qwen-Image", qwen_vae.infer, qwen_vae.PATTERN, qwen_vae.unread_reason),
        SingleFileComponent(CONTROLNET, "", "Qwen-Image ControlNet", controlnet.infer, _CONTROL_BLOCKS),
    ),
    separate_parts=True,
    asks_variant=lambda configs: not _has_marker(configs),
    detect_training=lambda _: _FLOW,
    detect_variant=lambda _: EDIT_2511,
    variants={
        TEXT_TO_IMAGE: Variant(defaults=Defaults(50, 4.0)),
        EDIT: _edit(1, reference_size, "QwenImageEditPipeline", zero_reference_time=False),
        EDIT_2509: _edit(MOST_REFERENCES, condition_size, "QwenImageEditPlusPipeline", zero_reference_time=False),
        EDIT_2511: _edit(MOST_REFERENCES, condition_size, "QwenImageEditPlusPipeline", zero_reference_time=True),
    },
    declared_variants={
        "qwen-image-edit": EDIT,
        "qwen-image-edit-plus": EDIT_2509,
        "qwen-image-edit-2509": EDIT_2509,
        "qwen-image-edit-2511": EDIT_2511,
    },
    recognise_folder=_recognise_folder,
    detect_folder_training=lambda _: _FLOW,
    detect_folder_variant=_folder_variant,
    find_mismatch=_find_mismatch,
    folder_settings=_folder_settings,
    left_over=_left_over,
    # Each prompt has a call of its own in diffusers' pipeline. Rows that are computed together have other last bits.
    rows_together=False,
    latent_space="qwen",
    adapter_signs=AdapterSigns(
        # FLUX.1 and Stable Diffusion 3 have blocks of this name, too, but at most 38 of them.
        names=re.compile(
            r"transformer_blocks[._][0-9]+[._](img|txt)_(mod|mlp)|transformer_blocks[._](3[89]|[45][0-9])[._]"
        ),
        declared=frozenset({"qwen-image", "qwen_image", "qwenimage"}),
    ),
    gguf_architecture="qwen_image",
    pipeline_class="QwenImagePipeline",
)

FAMILIES = (QWEN_IMAGE,)
