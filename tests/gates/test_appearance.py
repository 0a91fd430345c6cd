"""What looks suspicious is marked, and what does not is not."""

from __future__ import annotations

import pytest
import torch

import safelight
from safelight.arch.diffusers_fence import pictures
from safelight.engine.local import LocalEngine
from safelight.gates import appearance
from safelight.gates.appearance import Looks

PROMPTS = ("red apple", "octopus", "rocket", "cactus", "koala", "strawberry")


def smooth(seed: int, side: int = 64) -> torch.Tensor:
    """(1, 4, side, side) latents whose neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(1, 4, side // 8, side // 8, generator=generator)
    return torch.nn.functional.interpolate(small, (side, side), mode="bicubic")


def decoded(latents: torch.Tensor) -> torch.Tensor:
    """As a VAE that is a linear map: uint8 (8h, 8w, 3)."""
    basis = torch.tensor([[0.3, 0.2, 0.2], [0.2, 0.3, 0.17], [-0.16, 0.19, 0.26], [-0.18, -0.27, -0.47]]) * 0.4
    colours = torch.einsum("nchw,cd->nhwd", latents, basis)[0] + 0.5
    pixels = (colours.clamp(0, 1) * 255).to(torch.uint8)
    return pixels.repeat_interleave(8, 0).repeat_interleave(8, 1)


def test_one_colour_is_marked() -> None:
    latents = smooth(0)
    for value in (0, 127, 255):
        assert Looks().marks("v", latents, torch.full((512, 512, 3), value, dtype=torch.uint8)) == [
            "it is of one colour"
        ]
    assert Looks().marks("v", latents, decoded(latents)) == []


def test_noise_is_marked() -> None:
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert Looks().marks("v", latents, decoded(latents)) == ["it looks like noise"]
    (mark,) = Looks().marks("v", latents * 30, decoded(latents))
    assert "spread by 30" in mark


def test_latents_of_another_vae_are_marked_when_the_vae_is_known() -> None:
    looks = Looks()
    for seed in range(3):
        assert looks.marks("v", smooth(seed), decoded(smooth(seed))) == []
    turned = smooth(9).flip(1)
    assert looks.marks("other", smooth(9), decoded(turned)) == []
    (mark,) = looks.marks("v", smooth(9), decoded(turned))
    assert "not those that this VAE gave" in mark
    shifted = decoded(smooth(9))[..., [2, 0, 1]].contiguous()
    assert len(looks.marks("v", smooth(9), shifted)) == 1
    # What is marked teaches nothing.
    assert looks.marks("v", smooth(10), decoded(smooth(10))) == []


def test_the_starters_images_are_not_marked(engine: LocalEngine) -> None:
    for prompt in PROMPTS[:4]:
        for model in ("starter-noto", "starter-twemoji", "starter-fluent"):
            image = next(engine.generate(safelight.Request(prompt, model, steps=6)))
            assert image.metadata["marks"] == []


def test_a_decoder_that_shifts_colours_is_marked_and_the_image_given(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in PROMPTS:
        for model in ("starter-noto", "starter-twemoji", "starter-fluent"):
            next(engine.generate(safelight.Request(prompt, model, steps=3)))
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda vae, latents, tile: decode(vae, latents, tile).flip(1))
    image = next(engine.generate(safelight.Request("red apple", "starter-noto", steps=8)))
    assert any("not those that this VAE gave" in mark for mark in image.metadata["marks"])
    assert any("it can be right all the same" in warning for warning in image.warnings)


def test_the_fit_that_ships_fits_its_features() -> None:
    fit = appearance.Fit.read()
    assert len(fit.centre) == len(appearance.AGREEMENT)
    assert len(fit.weights) == appearance.design(fit.centre[None]).shape[1]
    assert fit.score(fit.centre) < fit.threshold
