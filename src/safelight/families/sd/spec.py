"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

from safelight.families.components import Component, Config, SingleFileComponent
from safelight.families.family import CONTROLNET, VARIANTS, AdapterSigns, Family, Latents, Noise, Training, Variant
from safelight.families.features import Feature
from safelight.families.parts import clip, vae
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.vae import VAEConfig
from safelight.families.rules import KindRule, rule
from safelight.families.sd import controlnet, leftover, recognition, unet
from safelight.families.sd.controlnet import ControlNetConfig
from safelight.families.sd.recognition import POSITIONS, VOCABULARY
from safelight.families.sd.unet import UNetConfig
from safelight.families.tables import Shapes
from safelight.files.folder import Folder
from safelight.request.adapters import Purpose

ARCHITECTURES: tuple[type[Config], ...] = (CLIPConfig, UNetConfig, VAEConfig, ControlNetConfig)

FEATURES = frozenset(Feature) - {Feature.REFERENCES, Feature.FIRST_BLOCK_CACHE}

BETAS: Mapping[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The noise schedule of every Stable Diffusion up to XL."""

LATENT_CHANNELS = 4
LATENT_SCALE = 8
STANDARD_VAE = VAEConfig(3, 3, LATENT_CHANNELS, (128, 256, 512, 512), 2)
CLIP_L = CLIPConfig(768, 3072, 12, VOCABULARY, POSITIONS, None, "quick_gelu")

LATENT_RGB_FACTORS = (
    (0.149, 0.1035, 0.104),
    (0.0935, 0.143, 0.0865),
    (-0.079, 0.0945, 0.132),
    (-0.092, -0.1355, -0.2365),
    (0.5, 0.5, 0.5),
)
"""SD 1's map from latents to colours, widely used for previews."""

DENOISER = r"model\.diffusion_model\."

_BLOCK_COUNT = 26
"""Blocks of the UNet and one for the text encoder, as sd-webui-lora-block-weight counts them."""

BLOCKS: Mapping[int, tuple[str, ...]] = {
    _BLOCK_COUNT: ("BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12))),
    17: ("BASE", *(f"IN{n:02d}" for n in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{n:02d}" for n in range(3, 12))),
}

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.([0-9]+)")


def block_of(names: Iterable[str]) -> str:
    """Return the block of LDM's UNet that contains a module, from the module's names; ``BASE`` if there is none."""
    for name in names:
        found = _BLOCK.match(name)
        if found is not None:
            kind = {"input_blocks": "IN", "output_blocks": "OUT"}.get(found[1])
            return "M00" if kind is None else f"{kind}{int(found[2]):02d}"
    return "BASE"


def denoiser(standard: UNetConfig | None) -> Component:
    return Component(
        "unet",
        Purpose.DENOISER,
        ("model.diffusion_model.", "unet."),
        unet.infer,
        standard,
        lora_prefixes=("lora_unet_", "lycoris_"),
        lora_paths=("diffusion_model.",),
        block_of=block_of,
    )


def autoencoder() -> Component:
    return Component("vae", Purpose.VAE, ("first_stage_model.", "vae."), vae.infer, STANDARD_VAE)


def first_encoder(activation: str, standard: CLIPConfig, drop_last: bool, *prefixes: str) -> Component:
    """Return the only text encoder of SD 1 or 2, or the first one of SDXL.

    ``drop_last``: leave out the last layer of an OpenCLIP encoder.
    """

    def infer(shapes: Shapes) -> CLIPConfig:
        return clip.without_projection(clip.infer(shapes, activation, drop_last))

    return Component(
        "text_encoder",
        Purpose.TEXT_ENCODER,
        (*prefixes, "text_encoder."),
        infer,
        standard,
        lora_prefixes=("lora_te_", "lora_te1_"),
        lora_paths=("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
        optional_prefix="text_model.",
        tokenizer=clip.tokenizer(),
    )


def latents(scaling_factor: float, cast_first: bool = False) -> Latents:
    return Latents(
        LATENT_CHANNELS,
        LATENT_SCALE,
        LATENT_SCALE,
        scaling_factor,
        cast_first=cast_first,
        latent_rgb_factors=LATENT_RGB_FACTORS,
    )


def _recognise_folder(linear: bool, folder: Folder) -> str | None:
    config = recognition.unet_of(folder)
    if config is None or config.time_features is not None or config.linear_projection != linear:
        return None
    return f"a UNet whose projections are {'matrices' if linear else '1×1 convolutions'}"


def _named_rule(name: str, axes: Mapping[str, int]) -> KindRule:
    sentence = f"a text encoder and a UNet in diffusers' names; the shape of its projections says {name}"
    return KindRule("checkpoint", name, sentence, (r"unet\.conv_in\.", r"text_encoder\."), (r"text_encoder_2\.",), axes)


_PROJECTION = "unet.down_blocks.0.attentions.0.proj_in.weight"

SINGLE_FILE_COMPONENTS = (
    SingleFileComponent("vae", "first_stage_model.", "VAE", vae.infer),
    SingleFileComponent(
        CONTROLNET, "control_model.", "ControlNet", controlnet.infer, r"(control_model\.)?(down_blocks|input_blocks)\."
    ),
)

_VELOCITY = Training(
    "v_prediction", False, "v_prediction by default, as in SD 2.0 and 2.1 for 768 pixels; the file names none"
)

stable_diffusion = partial(
    Family,
    architectures=ARCHITECTURES,
    noise=Noise("discrete", BETAS),
    guidance="classifier_free",
    detect_variant=recognition.detect_variant,
    find_mismatch=recognition.find_mismatch,
    left_over=leftover.reason,
    keep=leftover.counts_for_layer_number,
    same_latents=recognition.same_latents,
    find_controlnet_mismatch=recognition.find_controlnet_mismatch,
)
"""What all families of Stable Diffusion have in common."""

SD1 = stable_diffusion(
    name="sd1",
    components=(
        first_encoder(
            "quick_gelu", CLIP_L, False, "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
        ),
        denoiser(UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 768, False)),
        autoencoder(),
    ),
    latents=latents(0.18215),
    resolution=512,
    features=FEATURES,
    model_module="safelight.families.sd.model",
    rules=(
        rule("checkpoint", "sd1", "an OpenAI CLIP text encoder", r"cond_stage_model\.transformer\.", DENOISER),
        _named_rule("sd1", {_PROJECTION: 4}),
    ),
    recognise_folder=partial(_recognise_folder, False),
    folder_settings=partial(recognition.folder_settings, 8, 0.18215, {"text_encoder": "quick_gelu"}),
    detect_training=partial(recognition.detect_training, default=recognition.epsilon("sd1")),
    detect_folder_training=partial(recognition.detect_folder_training, default=recognition.epsilon("sd1")),
    variants={**VARIANTS, recognition.INSTRUCT_PIX2PIX: Variant("image", "image_and_text")},
    block_names_by_count=BLOCKS,
    latent_space="sd",
    adapter_signs=AdapterSigns(
        768,
        None,
        lambda header: recognition.conv_projections(header) or recognition.single_encoder(header, 768),
        frozenset({"sd_v1", "sd_1.5", "stable-diffusion-v1"}),
    ),
    single_file_components=SINGLE_FILE_COMPONENTS,
    part_rules=(
        rule("unet", None, "a UNet in LDM's names and no text encoder", DENOISER + r"input_blocks\."),
        rule(
            "unet",
            None,
            "a UNet in diffusers' names",
            r"conv_in\.",
            r"down_blocks\.0\.",
            r"mid_block\.",
            r"time_embedding\.",
        ),
    ),
    gguf_architecture="sd1",
    pipeline_class="StableDiffusionPipeline",
    empty_pipeline_components=("safety_checker", "feature_extractor"),
)


SD2 = stable_diffusion(
    name="sd2",
    components=(
        first_encoder(
            "gelu",
            CLIPConfig(1024, 4096, 23, VOCABULARY, POSITIONS, None, "gelu"),
            True,
            "cond_stage_model.model.",
        ),
        denoiser(UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 1024, True)),
        autoencoder(),
    ),
    latents=latents(0.18215),
    resolution=768,
    features=FEATURES,
    model_module="safelight.families.sd.model",
    rules=(
        rule("checkpoint", "sd2", "an OpenCLIP text encoder", r"cond_stage_model\.model\.", DENOISER),
        _named_rule("sd2", {_PROJECTION: 2}),
    ),
    recognise_folder=partial(_recognise_folder, True),
    folder_settings=partial(recognition.folder_settings, None, 0.18215, {"text_encoder": "gelu"}),
    detect_training=partial(recognition.detect_training, default=_VELOCITY),
    detect_folder_training=partial(recognition.detect_folder_training, default=_VELOCITY),
    native_size=lambda prediction: 512 if prediction == "epsilon" else None,
    block_names_by_count=BLOCKS,
    latent_space="sd",
    adapter_signs=AdapterSigns(
        1024,
        None,
        lambda header: recognition.single_encoder(header, 1024),
        frozenset({"sd_v2", "sd_v2_v", "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"}),
    ),
    pipeline_class="StableDiffusionPipeline",
    empty_pipeline_components=("safety_checker", "feature_extractor"),
)

FAMILIES = (SD2, SD1)
"""SD 2 comes first: a file in diffusers' names without the projection that tells them apart is taken for SD 2."""
