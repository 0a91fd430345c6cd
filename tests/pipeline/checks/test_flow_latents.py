"""The checks with the latents of families with rectified flow, which have more channels, each of deviation 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.families import tiny_families
from support.scale import thinned

import safelight
from safelight.families.family import Latents
from safelight.families.parts import qwen_vae_model
from safelight.families.parts.flux2_vae import FLUX2_LATENTS
from safelight.families.parts.flux_latents import FLUX_LATENTS
from safelight.families.parts.qwen_vae import LATENTS_MEAN, LATENTS_STD, QWEN_LATENTS
from safelight.pipeline import model_stages
from safelight.pipeline.checks import latents as latent_checks
from safelight.pipeline.checks.appearance import NORMAL_DEVIATION, AppearanceCheck
from safelight.pipeline.denoise import Denoised, DenoiseInputs

FORMATS = {"flux": FLUX_LATENTS, "flux2": FLUX2_LATENTS, "qwen": QWEN_LATENTS}
SIDE = 64


def noise(latent_format: Latents, seed: int = 0) -> torch.Tensor:
    """Noise as latents of the VAE."""
    channels = latent_format.channels // latent_format.patch**2
    return torch.randn(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def rough(latent_format: Latents, seed: int = 0) -> torch.Tensor:
    """Latents of which a sixteenth of the channels is smooth, and the others are fine detail without any relation.

    The latents of VAEs with many channels have strong high frequencies (Skorokhodov et al. 2025, "Improving the
    Diffusability of Autoencoders", arXiv 2502.14831).
    """
    values = noise(latent_format, seed)
    count = values.shape[1] // 16
    smooth = F.interpolate(values[:, :count, : SIDE // 8, : SIDE // 8], (SIDE, SIDE), mode="bicubic")
    values[:, :count] = (smooth - smooth.mean((2, 3), keepdim=True)) / smooth.std((2, 3), keepdim=True)
    return values


def picture(values: torch.Tensor) -> torch.Tensor:
    """Pixels that follow the first channel, uint8 (height, width, 3)."""
    grey = (values[0, 0].clamp(-2, 2) * 60 + 127).to(torch.uint8)
    return grey.repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None].repeat(1, 1, 3)


@pytest.mark.parametrize("name", FORMATS)
def test_noise_and_one_colour_are_marked_and_fine_detail_is_not(name: str) -> None:
    right, wrong = rough(FORMATS[name]), noise(FORMATS[name])
    shown = picture(right)
    assert AppearanceCheck().marks("v", right, shown, lambda: shown) == []
    assert AppearanceCheck().marks("v", wrong, picture(wrong), lambda: shown) == ["it looks like noise"]
    constant = torch.full_like(shown, 127)
    assert AppearanceCheck().marks("v", right, constant, lambda: shown) == ["it has a single colour"]
    [mark] = AppearanceCheck().marks("v", right * 0, shown, lambda: shown)
    assert "standard deviation of its latents is 0.00" in mark


@pytest.mark.parametrize("name", FORMATS)
def test_bounds_follow_from_a_deviation_of_1(name: str) -> None:
    """Twelve deviations of noise are allowed, and an image's latents may have four times their normal deviation."""
    latent_format = FORMATS[name]
    assert latent_format.suspicious_above >= NORMAL_DEVIATION[1] * latent_checks.MAX_NOISE_SIGMAS
    # Half of what Stable Diffusion's may have: no picture of these VAEs has such latents.
    assert latent_checks.largest_allowed(1.0, latent_format.suspicious_above) < 75


def test_latents_of_the_published_statistics_have_deviation_1() -> None:
    mean, deviation = (torch.tensor(one).view(1, -1, 1, 1, 1) for one in (LATENTS_MEAN, LATENTS_STD))
    drawn = qwen_vae_model._normalise(noise(QWEN_LATENTS).unsqueeze(2) * deviation + mean, None)
    assert torch.allclose(drawn.std((2, 3)), torch.ones(16), atol=0.05)
    assert torch.allclose(drawn.mean((2, 3)), torch.zeros(16), atol=0.05)


@pytest.mark.parametrize("name", thinned(sorted(tiny_families(), key=lambda name: name != "qwen-image")))
def test_only_what_grows_beyond_is_marked(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_families()[name]
    model, engine = tiny.add_folder(root, tmp_path / "folder", 5), safelight.open_engine(root)
    strong = {"cfg": 15.0} if "cfg" in tiny.request else {}
    right = next(engine.generate(tiny.ask(model, **strong)))
    assert not any("latents reached" in mark for mark in right.metadata["marks"])
    denoise = model_stages.denoise

    def grown(work: DenoiseInputs) -> Denoised:
        return denoise(replace(work, on_call=lambda n, x: work.on_call(n, x * 100 / x.abs().max())))

    monkeypatch.setattr(model_stages, "denoise", grown)
    [mark] = [one for one in next(engine.generate(tiny.ask(model))).metadata["marks"] if "latents reached" in one]
    assert "latents reached 100 at step 1; at most" in mark
