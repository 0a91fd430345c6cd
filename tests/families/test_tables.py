"""The tables of tensors are exactly what diffusers' and transformers' modules have, at full size and narrow."""

from __future__ import annotations

import pytest
import torch
from support import checkpoints

from safelight.families.components import Config
from safelight.families.family_model import construct
from safelight.families.flux.transformer import FluxConfig
from safelight.families.parts.clip import CLIPConfig
from safelight.families.parts.t5 import T5Config
from safelight.families.parts.vae import VAEConfig
from safelight.families.parts.vae import infer as infer_vae
from safelight.families.registry import family
from safelight.families.sd.unet import UNetConfig, infer
from safelight.families.tables import Shapes

FULL: dict[str, tuple[str, Config]] = {
    "SD 1.5 UNet": ("sd1", UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 768, False)),
    "SD 2.1 UNet": ("sd2", UNetConfig(4, 4, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1, 1024, True)),
    "SDXL UNet": ("sdxl", UNetConfig(4, 4, (320, 640, 1280), 2, (0, 2, 10), 10, 2048, True, 2816)),
    "refiner UNet": ("sdxl-refiner", UNetConfig(4, 4, (384, 768, 1536, 1536), 2, (0, 4, 4, 0), 4, 1280, True, 2560)),
    "VAE": ("sd1", VAEConfig(3, 3, 4, (128, 256, 512, 512), 2)),
    "CLIP-L": ("sd1", CLIPConfig(768, 3072, 12, 49408, 77, None, "quick_gelu")),
    "T5-XXL": ("flux", T5Config(32128, 4096, 10240, 24, 64, 64)),
    "FLUX.1 dev": ("flux", FluxConfig(64, 16, 3072, 19, 38, 128, 4096, 768, guidance=True)),
    "FLUX.1 schnell": ("flux", FluxConfig(64, 16, 3072, 19, 38, 128, 4096, 768, guidance=False)),
    "OpenCLIP-G": ("sdxl", CLIPConfig(1280, 5120, 32, 49408, 77, 1280, "gelu")),
}


def same_as_module(base: str, config: Config) -> None:
    with torch.device("meta"):
        state = construct(family(base), config).state_dict()
    table = {row.name: row.shape for row in config.rows()}
    # T5's two names of its token embeddings are one tensor.
    state.pop("encoder.embed_tokens.weight", None)
    assert table == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("label", FULL)
def test_full_size(label: str) -> None:
    same_as_module(*FULL[label])


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_narrow(base: str) -> None:
    for config in checkpoints.configs(base).values():
        same_as_module(base, config)


@pytest.mark.parametrize("label", [label for label in FULL if "UNet" in label])
def test_settings_come_back_from_shapes_in_both_names(label: str) -> None:
    _, config = FULL[label]
    assert isinstance(config, UNetConfig)
    for which in (0, -1):
        shapes: Shapes = {row.sources[which].name: row.shape for row in config.rows()}
        assert infer(shapes) == config


def test_vae_settings_come_back_from_shapes_in_all_names() -> None:
    config = FULL["VAE"][1]
    for which in (0, 1, -1):
        shapes = {row.sources[min(which, len(row.sources) - 1)].name: row.shape for row in config.rows()}
        assert infer_vae(shapes) == config


def test_ldm_names_are_those_that_diffusers_converts() -> None:
    """diffusers' own converter, given our LDM names, returns the module's names with the same tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    for base in ("sd1", "sd2", "sdxl"):
        built = checkpoints.modules(base)
        tensors = checkpoints.ldm_tensors(base, built)
        unet = convert_ldm_unet_checkpoint(dict(tensors), dict(built["unet"].config))
        vae = convert_ldm_vae_checkpoint(dict(tensors), dict(built["vae"].config))
        for role, converted in (("unet", unet), ("vae", vae)):
            state = built[role].state_dict()
            assert converted.keys() == state.keys()
            assert all(torch.equal(converted[n].reshape(t.shape), t) for n, t in state.items())


def test_open_clip_names_are_those_that_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    built = checkpoints.modules("sdxl")
    tensors = checkpoints.ldm_tensors("sdxl", built)
    model = built["text_encoder_2"]
    converted = convert_open_clip_checkpoint(model, dict(tensors), prefix="conditioner.embedders.1.model.")
    state = model.state_dict()
    ours = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    assert all(torch.equal(ours[name.removeprefix("text_model.")], t) for name, t in state.items())


def test_parts_of_another_architecture_do_not_fit() -> None:
    """A package's family may have the same latent space, and components of its own."""
    unet, vae = FULL["SD 1.5 UNet"][1], FULL["VAE"][1]
    sd1 = family("sd1")
    assert sd1.same_latents(vae, vae)
    assert not sd1.same_latents(vae, unet)
    assert sd1.find_controlnet_mismatch(vae, unet) == "is a ControlNet of another architecture than {model}"
