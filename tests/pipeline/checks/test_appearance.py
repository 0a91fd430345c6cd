"""What check suspicious is marked, and what does not is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.scale import ALL, thinned, times

import safelight
from safelight.boundary import pictures
from safelight.diagnostics import canary
from safelight.diagnostics.canary import Canaries, after_switch
from safelight.errors import CanaryError
from safelight.pipeline import model_stages
from safelight.pipeline.checks import appearance
from safelight.pipeline.checks.appearance import AppearanceCheck
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.workers.local_engine import LocalEngine

pytestmark = pytest.mark.usefixtures("as_for_users")

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


def never() -> torch.Tensor:
    raise AssertionError("is not decoded again")


def test_one_colour_is_marked() -> None:
    latents = smooth(0)
    for value in (0, 127, 255):
        constant = torch.full((512, 512, 3), value, dtype=torch.uint8)
        assert AppearanceCheck().marks("v", latents, constant, never) == ["it has a single colour"]
    assert AppearanceCheck().marks("v", latents, decoded(latents), lambda: decoded(latents)) == []


def test_noise_is_marked_and_fine_textures_are_not() -> None:
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert AppearanceCheck().marks("v", latents, decoded(latents), never) == ["it looks like noise"]
    (mark,) = AppearanceCheck().marks("v", latents * 30, decoded(latents), never)
    assert "standard deviation of its latents is 30" in mark
    # Gravel and grass have channels that go together.
    texture = latents[:, :1].repeat(1, 4, 1, 1) + 0.3 * latents
    assert AppearanceCheck().marks("v", texture, decoded(texture), lambda: decoded(texture)) == []


@pytest.mark.parametrize("spoil", ["another VAE's latents", "colours shifted", "one square"])
def test_what_the_vae_does_not_make_again_is_marked(spoil: str) -> None:
    check = AppearanceCheck()
    for seed in range(appearance.ALWAYS_CHECKED + 20):
        right = decoded(smooth(seed))
        assert check.marks("v", smooth(seed), right, lambda right=right: right) == []
    marked = 0
    for seed in range(200, 200 + times(5, 20)):
        right = decoded(smooth(seed))
        wrong = {
            "another VAE's latents": decoded(smooth(seed).flip(1)),
            "colours shifted": right[..., [2, 0, 1]].contiguous(),
            "one square": right.clone(),
        }[spoil]
        if spoil == "one square":
            wrong[64:448, 64:448] = 255 - wrong[64:448, 64:448]
        marked += check.marks("v", smooth(seed), wrong, lambda right=right: right) == [
            "its VAE decodes the same latents to a different picture"
        ]
        # What is marked teaches nothing.
        assert check.marks("v", smooth(seed), right, lambda right=right: right) == []
    assert marked == times(5, 20)


def test_only_doubtful_images_are_decoded_again_once_a_vae_is_known() -> None:
    check, again = AppearanceCheck(), 0

    def look(seed: int) -> None:
        nonlocal again
        right = decoded(smooth(seed))

        def once_more() -> torch.Tensor:
            nonlocal again
            again += 1
            return right

        assert check.marks("v", smooth(seed), right, once_more) == []

    for seed in range(appearance.ALWAYS_CHECKED):
        look(seed)
    assert again == appearance.ALWAYS_CHECKED
    again = 0
    for seed in range(1000, 1000 + times(30, 100)):
        look(seed)
    assert again < times(18, 60)


def test_an_image_of_one_latent_spoils_nothing_for_later_ones() -> None:
    check, again = AppearanceCheck(), []
    for seed in range(appearance.ALWAYS_CHECKED + 100):
        latents = smooth(seed)[..., :1, :1] if seed == 50 else smooth(seed)
        pixels = decoded(latents)

        def decode(pixels: torch.Tensor = pixels, seed: int = seed) -> torch.Tensor:
            again.append(seed)
            return pixels

        check.marks("v", latents, pixels, decode)
    later = [seed for seed in again if seed >= appearance.ALWAYS_CHECKED]
    assert 1 <= len(later) <= 70


def test_the_starters_images_are_not_marked(engine: LocalEngine) -> None:
    for prompt in PROMPTS[: times(1, 4)]:
        for model in ("starter-noto", "starter-twemoji", "starter-fluent"):
            image = next(engine.generate(safelight.Request(prompt, model, steps=6)))
            assert image.metadata["marks"] == []


def shifting(times: int):
    """A decoder whose first results have their colours exchanged."""
    decode, left = pictures.decode, [times]

    def wrong(vae, latents: torch.Tensor, scale: int, tile: int) -> torch.Tensor:
        right = decode(vae, latents, scale, tile)
        left[0] -= 1
        return right.flip(1) if left[0] >= 0 else right

    return wrong


def test_a_decoder_that_shifts_colours_once_is_marked_and_the_image_given(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "decode", shifting(1))
    image = next(engine.generate(safelight.Request("red apple", "starter-noto", steps=8)))
    assert image.metadata["marks"] == ["its VAE decodes the same latents to a different picture"]
    assert any("the image may still be correct" in warning for warning in image.warnings)
    assert next(engine.generate(safelight.Request("red apple", "starter-noto", steps=8))).metadata["marks"] == []


@pytest.mark.parametrize(
    "fault", thinned(["weights one channel off", "colours shifted", "another VAE's latents", "attention"])
)
def test_what_stays_wrong_is_found_by_the_canary_every_time(
    fault: str, root: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same wrong pixels come each time, so that no look at one image tells it; the canary is another process's."""
    monkeypatch.setattr(canary, "TOKENS_PER_SIDE", canary.TOKENS_PER_SIDE if ALL else 8)
    fresh = safelight.open_engine(root)
    canaries = Canaries(root, lambda asked, _: next(fresh.generate(asked)))
    engine = safelight.open_engine(root, verify_transfers="off")
    engine.on_switch = after_switch(canaries, engine.image_repairer)
    for name in "ab":
        engine.library.add(tiny / f"{name}.safetensors", name)
        next(engine.generate(ask(name)))
    decode, denoise = pictures.decode, model_stages.denoise
    if fault == "colours shifted":
        monkeypatch.setattr(pictures, "decode", lambda vae, *more: decode(vae, *more).flip(1))
    elif fault == "another VAE's latents":
        monkeypatch.setattr(pictures, "decode", lambda vae, latents, *more: decode(vae, latents.flip(1), *more))
    else:
        layer = "conv_in" if fault == "weights one channel off" else "conv_out"

        def spoiled(work: DenoiseInputs) -> Denoised:
            roll = getattr(work.denoiser, layer).register_forward_hook(lambda _, __, out: out.roll(1, 1))
            try:
                return denoise(work)
            finally:
                roll.remove()

        monkeypatch.setattr(model_stages, "denoise", spoiled)
    for name in "ab":
        with pytest.raises(CanaryError):
            next(engine.generate(ask(name)))


def ask(name: str) -> safelight.Request:
    return safelight.Request("red apple", name, steps=2, width=64, height=64)


@pytest.mark.parametrize(("channels", "height", "width", "stride"), [(4, 8, 12, 1), (16, 9, 7, 5), (3, 1, 1, 1)])
def test_features_of_samples_are_those_of_all_latents(channels: int, height: int, width: int, stride: int) -> None:
    latents = torch.randn(channels, height, width, dtype=torch.float64)
    around = F.unfold(F.pad(latents[None], (1, 1, 1, 1), mode="replicate"), 3)[0].T
    assert torch.equal(appearance._features(latents, stride), appearance._features(latents)[::stride])
    assert torch.equal(appearance._features(latents)[:, : 9 * channels], around)


def test_features_of_a_large_image_take_little_memory() -> None:
    """A FLUX.2 VAE has 32 channels: all features of 2048x2048 pixels are half a gigabyte."""
    latents = torch.randn(32, 256, 256, dtype=torch.float64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        appearance._features(latents, 65)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    assert allocated < 150e6
