"""Previews: colours of latents before the VAE has decoded anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import tiny_families
from support.scale import thinned

import safelight
from safelight.families import registry
from safelight.families.family import Family, Latents
from safelight.families.parts.flux2_vae import FLUX2_LATENTS
from safelight.families.parts.flux_latents import FLUX_LATENTS
from safelight.families.parts.qwen_vae import QWEN_LATENTS
from safelight.pipeline.preview import Previews
from safelight.pipeline.upscale import lay_out_patches
from safelight.request.results import Preview, Progress


def preview_of(latents: torch.Tensor, latent_format: Latents) -> Preview:
    return Previews().of("vae", lay_out_patches(latents, latent_format.patch), latent_format.latent_rgb_factors)


@pytest.mark.parametrize("family", registry.families().values(), ids=lambda family: family.name)
def test_every_family_has_a_colour_for_each_channel_of_its_vae(family: Family) -> None:
    latent_format = family.latents
    assert len(latent_format.latent_rgb_factors) == latent_format.channels // latent_format.patch**2 + 1
    latents = torch.randn(1, latent_format.channels, 8, 4, generator=torch.Generator().manual_seed(0)) / 2
    shown = preview_of(latents, latent_format)
    assert (shown.width, shown.height) == (4 * latent_format.patch, 8 * latent_format.patch)
    values = torch.frombuffer(bytearray(shown.pixels), dtype=torch.uint8).view(-1, 3).float()
    # Colours differ in brightness and in hue, and few are cut off.
    assert values.std(0).min() > 5
    assert values.std(1).mean() > 2
    assert ((values == 0) | (values == 255)).float().mean() < 0.1


@pytest.mark.parametrize(
    ("latent_format", "channel", "colour"),
    [(FLUX_LATENTS, 13, (113, 124, 117)), (QWEN_LATENTS, 2, (150, 149, 107))],
    ids=["flux", "qwen"],
)
def test_a_known_latent_has_its_colour(latent_format: Latents, channel: int, colour: tuple[int, int, int]) -> None:
    latents = torch.zeros(1, 16, 2, 2)
    latents[0, channel, 1, 0] = 1
    assert tuple(preview_of(latents, latent_format).pixels[6:9]) == colour


def test_a_channel_of_flux2_is_one_of_four_places() -> None:
    latents = torch.zeros(1, 128, 1, 2)
    latents[0, 3 * 4 + 2, 0, 1] = 1
    shown = preview_of(latents, FLUX2_LATENTS)
    pixels = torch.frombuffer(bytearray(shown.pixels), dtype=torch.uint8).view(2, 4, 3)
    # Channel 3 of the VAE, in the lower left of the second place.
    assert pixels[1, 2].tolist() == [151, 157, 163]
    pixels[1, 2] = pixels[0, 0]
    assert pixels.flatten(0, 1).unique(dim=0).tolist() == [[123, 118, 117]]


@pytest.mark.parametrize("name", thinned(sorted(tiny_families(), key=lambda name: name != "flux2-klein")))
def test_a_job_shows_every_step(name: str, root: Path, tmp_path: Path) -> None:
    tiny_family = tiny_families()[name]
    model = tiny_family.add_folder(root, tmp_path / "folder", 5)
    engine = safelight.open_engine(root)
    engine.resources = replace(engine.resources, previews=Previews())
    seen: list[Progress] = []
    next(engine.generate(tiny_family.ask(model), on_progress=seen.append))
    shown = [one.preview for one in seen if one.preview is not None]
    assert len(shown) == 2
    assert {(one.width, one.height) for one in shown} == {(tiny_family.picture_side // 8,) * 2}
    assert len({one.pixels for one in shown}) == 2
