"""How files of Stable Diffusion are recognised, and what they were trained to predict. SDXL's differ in data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safelight.errors import UnsupportedModelError
from safelight.families.components import Config
from safelight.families.family import Training
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.vae import NORM_GROUPS, VAEConfig
from safelight.families.sd import unet
from safelight.families.sd.controlnet import ControlNetConfig
from safelight.families.sd.unet import UNetConfig
from safelight.families.tables import NotThisArchitecture
from safelight.files.folder import Folder
from safelight.files.header import Header

INSTRUCT_PIX2PIX = "instruct-pix2pix"
"""The variant that changes an image as the prompt says (Brooks et al. 2023, arXiv 2211.09800)."""

VARIANTS: Mapping[int, str] = {4: "text-to-image", 5: "depth", 8: INSTRUCT_PIX2PIX, 9: "inpainting"}
"""Variant of a checkpoint by the number of input channels of its UNet."""

VOCABULARY = 49408
POSITIONS = 77
CHANNELS_PER_HEAD = 64

TIME_IDS_WIDTH = 256
"""Width of each of SDXL's size and crop numbers (six of them, five for the refiner) in its added conditioning."""

LATENT_LEVELS = 4
"""Levels of a VAE whose latents are eight times smaller than its images, in each direction."""


def unet_of(folder: Folder) -> UNetConfig | None:
    """Return the settings of a folder's UNet, None if it has none. Raises UnsupportedModelError for an unknown one."""
    header = folder.components.get("unet")
    if header is None:
        return None
    try:
        return unet.infer({name: info.shape for name, info in header.tensors.items()})
    except NotThisArchitecture as error:
        raise UnsupportedModelError(folder.path, f"is a {folder.pipeline} whose UNet is unknown: {error}") from error


def detect_variant(configs: Mapping[str, Config]) -> str | None:
    """Return a checkpoint's variant from the input channels of its UNet, None for an unknown one."""
    config = configs["unet"]
    return VARIANTS.get(config.in_channels) if isinstance(config, UNetConfig) else None


def folder_settings(
    heads: int | None, factor: float, activations: Mapping[str, str], configs: Mapping[str, Config]
) -> Iterable[tuple[str, str, object]]:
    """Yield the settings that follow from the family, as diffusers writes them.

    ``heads``: attention heads of the UNet; None for 64 channels per head.
    ``factor``: factor of the latents.
    ``activations``: activation function of each text encoder.
    """
    config = configs["unet"]
    assert isinstance(config, UNetConfig)
    yield "vae", "scaling_factor", factor
    yield "vae", "norm_num_groups", NORM_GROUPS
    yield "unet", "norm_num_groups", NORM_GROUPS
    yield "unet", "attention_head_dim", [attention_heads(heads, width) for width in config.block_out_channels]
    for role, activation in activations.items():
        yield role, "hidden_act", activation


def attention_heads(heads: int | None, width: int) -> int:
    """Return the number of attention heads of a UNet's level that is ``width`` channels wide, at least 1."""
    return heads or max(1, width // CHANNELS_PER_HEAD)


def find_mismatch(configs: Mapping[str, Config]) -> str | None:
    """Return why these complete components cannot work together, None if they can."""
    encoders = [config for config in configs.values() if isinstance(config, CLIPConfig)]
    net, auto = configs["unet"], configs["vae"]
    assert isinstance(net, UNetConfig)
    assert isinstance(auto, VAEConfig)
    for encoder in encoders:
        if (encoder.vocabulary, encoder.positions) != (VOCABULARY, POSITIONS):
            return f"a text encoder for {encoder.vocabulary} tokens at {encoder.positions} positions is not CLIP"
        if encoder.width % CHANNELS_PER_HEAD:
            return f"a text encoder {encoder.width} wide has no whole number of heads"
    for name, widths in (("UNet", net.block_out_channels), ("VAE", auto.block_out_channels)):
        if any(width % NORM_GROUPS for width in widths):
            return f"widths {widths} of its {name} are not multiples of {NORM_GROUPS}"
    context = sum(encoder.width for encoder in encoders)
    if net.cross_attention_dim != context:
        return f"its UNet reads text {net.cross_attention_dim} wide, its text encoders return {context}"
    pooled = encoders[-1].projection
    if net.time_features is not None and pooled is not None:
        numbers = 6 if len(encoders) == 2 else 5
        if net.time_features != numbers * TIME_IDS_WIDTH + pooled:
            wanted = numbers * TIME_IDS_WIDTH + pooled
            return f"its UNet's added conditioning is {net.time_features} wide instead of {wanted}"
    if (auto.latent_channels, len(auto.block_out_channels)) != (net.out_channels, LATENT_LEVELS):
        return "the latents of its VAE and of its UNet differ"
    return None


def epsilon(name: str) -> Training:
    """Return the default for files that name no prediction type: epsilon."""
    return Training("epsilon", False, f"epsilon by default, as in {name}'s training; the file names none")


def detect_training(header: Header, default: Training) -> Training:
    """Return what a single file was trained to predict: by the community's markers, else ``default``.

    Raises UnsupportedModelError for a marker of another kind of training.
    """
    snr = "ztsnr" in header.tensors
    if "v_pred" in header.tensors:
        return Training("v_prediction", snr, "v_prediction by its marker tensor v_pred")
    said = header.metadata.get("modelspec.prediction_type", "").lower().replace("-", "_")
    if said in ("v", "v_prediction", "vprediction"):
        return Training("v_prediction", snr, "v_prediction by modelspec.prediction_type")
    if said in ("epsilon", "eps"):
        return Training("epsilon", snr, "epsilon by modelspec.prediction_type")
    edm = next((name for name in header.tensors if name.startswith("edm_")), None)
    if said or edm:
        raise UnsupportedModelError(
            header.path, f"has prediction type {said or 'EDM (' + str(edm) + ')'}, which is not supported"
        )
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    if architecture.endswith("-v") or "768-v" in architecture:
        return Training("v_prediction", snr, f"v_prediction by modelspec.architecture {architecture}")
    if architecture.startswith("stable-diffusion-v2-512"):
        return Training("epsilon", snr, f"epsilon by modelspec.architecture {architecture}")
    return Training(default.prediction_type, snr, default.why)


def detect_folder_training(folder: Folder, default: Training) -> Training:
    """Return what a folder's model was trained to predict: by its scheduler's settings, else ``default``."""
    snr = bool(folder.scheduler.get("rescale_betas_zero_snr", False))
    said = folder.scheduler.get("prediction_type")
    if said in ("epsilon", "v_prediction"):
        return Training(said, snr, f"its scheduler's settings say {said}")
    if said is not None:
        raise UnsupportedModelError(folder.path, f"its scheduler has prediction type {said!r}, which is not supported")
    return Training(default.prediction_type, snr, default.why)


def conv_projections(header: Header) -> bool:
    """Whether an adapter changes 1×1 convolutions around the UNet's attention, which only SD 1 has."""
    return any(_is_lora_down(name) and "proj_in" in name and len(i.shape) == 4 for name, i in header.tensors.items())


def single_encoder(header: Header, width: int) -> bool:
    """Whether an adapter changes a single text encoder (kohya: ``lora_te_``) of this width."""
    return any(
        _is_lora_down(name) and name.startswith("lora_te_") and "_fc2" not in name and i.shape[1:] == (width,)
        for name, i in header.tensors.items()
    )


def _is_lora_down(name: str) -> bool:
    return any(part in name for part in ("lora_down", "lora_A", "lora.down"))


def same_latents(one: Config, other: Config) -> bool:
    """Whether two VAEs have the same number of latent channels and the same downscaling factor."""
    if not isinstance(one, VAEConfig) or not isinstance(other, VAEConfig):
        # The VAE of a package's family that has the same ``latent_space``.
        return False
    form = one.latent_channels, len(one.block_out_channels)
    return form == (other.latent_channels, len(other.block_out_channels))


def find_controlnet_mismatch(control: Config, denoiser: Config) -> str | None:
    """Return why a ControlNet does not fit a UNet, None if it does."""
    if not isinstance(control, ControlNetConfig) or not isinstance(denoiser, UNetConfig):
        return "is a ControlNet of another architecture than {model}"
    theirs = control.encoder
    for what, its, ours in (
        ("reads text of width", theirs.cross_attention_dim, denoiser.cross_attention_dim),
        ("has blocks of widths", theirs.block_out_channels, denoiser.block_out_channels),
        ("has blocks of depths", (theirs.depths, theirs.mid_depth), (denoiser.depths, denoiser.mid_depth)),
        ("layers_per_block is", theirs.layers_per_block, denoiser.layers_per_block),
        ("has added conditioning of width", theirs.time_features, denoiser.time_features),
        ("use_linear_projection is", theirs.linear_projection, denoiser.linear_projection),
    ):
        if its != ours:
            return f"{what} {its}, but {ours} in {{model}}"
    if control.hint_channels != 3:
        return f"is shown pictures of {control.hint_channels} channels, not 3"
    return None
