"""High-resolution fix, variations, tiled decoding, seamless images, outpainting, other text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image as PILImage
from support import checkpoints, controls, oracle
from support.scale import thinned

from safelight.errors import RequestError
from safelight.memory.lease import Use
from safelight.pipeline import noise, stages
from safelight.pipeline.checks import latents
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

Ask = Callable[..., Request]


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


def array(image: Image) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    return pipe


# High-resolution fix


def twice(base: str, seed: int, upscale: Callable[[Any, torch.Tensor], Any], **call: Any) -> np.ndarray:
    """By diffusers: text to image, enlarged, image to image."""
    pipe = quiet(oracle.pipeline(base, seed))
    common = {"negative_prompt": "blue", "guidance_scale": 5.0}
    generator = torch.Generator("cpu").manual_seed(11)
    first = pipe(
        "red apple", num_inference_steps=4, width=64, height=64, generator=generator, output_type="latent", **common
    ).images
    kinds = {"sd1": diffusers.StableDiffusionImg2ImgPipeline, "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline}
    again = quiet(kinds[base].from_pipe(pipe))
    again.scheduler = EulerDiscreteScheduler.from_config(oracle.SCHEDULE)
    made = again(
        "red apple",
        image=upscale(pipe, first),
        strength=0.6,
        num_inference_steps=5,
        generator=torch.Generator("cpu").manual_seed(11),
        **common,
    )
    return np.asarray(made.images[0])


def larger(_: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(latents, (12, 12), mode="bilinear")


def enlarged(pipe: Any, latents: torch.Tensor) -> PILImage.Image:
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded)[0].resize((96, 96), PILImage.Resampling.LANCZOS)


@pytest.mark.parametrize(
    ("base", "name", "upscaler", "upscale"),
    thinned(
        [
            ("sd1", "a.safetensors", "lanczos", enlarged),
            ("sdxl", "xl.safetensors", "latent", larger),
            ("sd1", "a.safetensors", "latent", larger),
        ],
        2,
        unpack=True,
    ),
    ids=["sd1, enlarges pixels", "sdxl, enlarges latents", "sd1, enlarges latents"],
)
def test_hires_fix_equals_two_passes_of_diffusers(
    engine: LocalEngine, ask: Ask, base: str, name: str, upscaler: str, upscale: Any
) -> None:
    asked = ask(
        name, negative="blue", seed=11, steps=4, cfg=5.0, hires_scale=1.5, hires_upscaler=upscaler,
        hires_strength=0.6, hires_steps=5,
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    image = next(engine.generate(asked, lambda p: seen.append((p.step, p.steps)) if p.stage == "denoise" else None))
    assert np.array_equal(array(image), twice(base, {"sd1": 1, "sdxl": 4}[base], upscale))
    assert seen == [(step, 7) for step in range(1, 8)]


def test_progress_and_messages_count_steps_not_calls_of_the_denoiser(
    engine: LocalEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heun's sampler calls the denoiser twice in each step but the last."""
    checked: list[str] = []
    require_finite = latents.require_finite

    def record(values: torch.Tensor, what: str, dtype: str) -> float:
        checked.append(what)
        return require_finite(values, what, dtype)

    monkeypatch.setattr(latents, "require_finite", record)
    seen: list[tuple[int, int]] = []
    asked = ask(sampler="heun", steps=4, hires_scale=1.5, hires_strength=0.5)
    next(engine.generate(asked, lambda p: seen.append((p.step, p.steps)) if p.stage == "denoise" else None))
    steps = (1, 1, 2, 2, 3, 3, 4, 5, 5, 6)
    assert seen == [(step, 6) for step in steps]
    named = [what for what in checked if what.startswith("the denoiser")]
    assert named == [f"the denoiser, at step {step}," for step in steps]


def test_high_resolution_fix_is_refused_where_it_means_nothing(ask: Ask) -> None:
    for values in ({"hires_scale": 0.5}, {"hires_scale": 2, "hires_upscaler": "esrgan"}, {"hires_strength": 0}):
        with pytest.raises(RequestError, match="hires"):
            ask(**values)
    with pytest.raises(RequestError, match="start from noise"):
        ask(hires_scale=2, image="x.png")
    with pytest.raises(RequestError, match="computes less than one step of 1; use at least 1"):
        ask(hires_scale=2, hires_steps=1, hires_strength=0.5)


# Variations


def test_variations_lie_between_two_seeds(engine: LocalEngine, ask: Ask) -> None:
    plain, other = (next(engine.generate(ask(seed=seed))).pixels_sha256 for seed in (3, 9))
    none = next(engine.generate(ask(seed=3, variation_seed=9)))
    whole = next(engine.generate(ask(seed=3, variation_seed=9, variation_strength=1)))
    assert (none.pixels_sha256, whole.pixels_sha256) == (plain, other)
    several = list(engine.generate(ask(seed=3, variation_seed=9, variation_strength=0.2, count=2)))
    assert [image.seed for image in several] == [3, 3]
    assert [image.metadata["request"]["variation_seed"] for image in several] == [9, 10]
    again = Request(**{**several[1].metadata["request"], "model": ask().model})
    assert next(engine.generate(again)).pixels_sha256 == several[1].pixels_sha256
    assert len({plain, other, *(image.pixels_sha256 for image in several)}) == 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_variations_of_a_picture(engine: LocalEngine, ask: Ask, tmp_path: Path, masked: bool, strength: float) -> None:
    more: dict[str, Any] = {"image": str(controls.picture(tmp_path / "in.png")), "strength": strength, "steps": 3}
    if masked:
        PILImage.new("L", (64, 64), 255).save(tmp_path / "mask.png")
        more["mask"] = str(tmp_path / "mask.png")
    made = [
        next(engine.generate(ask(**more, variation_seed=9, variation_strength=share))).pixels_sha256
        for share in (0.0, 0.3, 0.3, 0.9)
    ]
    assert made[1] == made[2]
    assert len(set(made)) == 3


def test_noise_between_two_is_noise() -> None:
    one, other = (noise.draw_seeded_noise((1, 4, 64, 64), seed, torch.float32, torch.device("cpu")) for seed in (1, 2))
    for share in (0.0, 0.25, 0.5, 1.0):
        assert abs(noise.slerp(one, other, share).std().item() - 1) < 0.02
    assert torch.allclose(noise.slerp(one, other, 0.0), one)
    assert torch.equal(noise.slerp(one, one, 0.3), one)


# Tiled decoding


def test_state_24_decoding_in_tiles_equals_diffusers_and_changes_no_later_image(engine: LocalEngine, ask: Ask) -> None:
    """A VAE's tiling flags are set for one call; what is decoded whole afterwards is as before."""
    wide: dict[str, Any] = {"width": 192, "height": 128, "seed": 2, "cfg": 5.0}
    before = next(engine.generate(ask(**wide)))
    tiled = next(engine.generate(ask(**wide, tile=64)))
    assert next(engine.generate(ask(**wide))).pixels_sha256 == before.pixels_sha256
    pipe = quiet(oracle.pipeline("sd1", 1))
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    right = pipe(
        "red apple", negative_prompt="", num_inference_steps=2, guidance_scale=5.0, width=192, height=128,
        generator=torch.Generator("cpu").manual_seed(2),
    )  # fmt: skip
    assert np.array_equal(array(tiled), np.asarray(right.images[0]))
    assert tiled.pixels_sha256 != before.pixels_sha256
    assert (before.metadata["request"]["tile"], tiled.metadata["request"]["tile"]) == (0, 64)


def test_large_images_are_tiled_by_rule_which_is_recorded(engine: LocalEngine, ask: Ask) -> None:
    from safelight.pipeline.drawing import ImagePipeline
    from safelight.resolve.resolve import resolve

    def tile(**changes: Any) -> int:
        asked = ask(**changes)
        model = engine.library.find(asked.model)
        return ImagePipeline(
            resolve(asked, engine.catalog, model=model), model, None, engine.resources, 0, lambda _: None
        ).tile

    assert tile(width=1536, height=1536) == 0
    assert tile(width=1544, height=1536) == 768
    assert tile(width=1544, height=1536, tile=0) == 0
    assert tile(width=1024, height=1024, hires_scale=2) == 768
    assert tile(width=1544, height=1536, seamless="x") == 0
    with pytest.raises(RequestError, match="multiple of 64"):
        ask(tile=100)
    with pytest.raises(RequestError, match="seamless"):
        ask(tile=64, seamless="x")


# Seamless


def test_seamless_images_go_on_at_their_other_side(engine: LocalEngine, ask: Ask) -> None:
    """Rolled noise gives the rolled image, as nothing knows where the border is; without it, it does not."""
    from safelight.models.skeleton import SkeletonKey, build

    configs = checkpoints.configs("sd1")
    cpu = torch.device("cpu")
    state = checkpoints.modules("sd1", 1)["vae"].state_dict()
    values = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for axes, dims in (("xy", (2, 3)), ("x", (3,)), ("y", (2,)), ("", ())):
        vae: Any = build(SkeletonKey("sd1", "vae", configs["vae"], torch.float32, "torch-sdp", cpu, seamless=axes))
        vae.load_state_dict(state, assign=True)
        plain = vae.decode(values)[0]
        for dim in (2, 3):
            rolled = vae.decode(values.roll(3, dim))[0].roll(-24, dim)
            assert torch.allclose(rolled, plain, atol=1e-4) == (dim in dims), (axes, dim)
    made = {axes: next(engine.generate(ask(seamless=axes))).pixels_sha256 for axes in ("", "x", "y", "xy", "")}
    assert len(set(made.values())) == 4
    assert next(engine.generate(ask())).pixels_sha256 == made[""]


# Outpainting


def test_outpainting_keeps_the_picture_and_draws_around_it(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    path = controls.picture(tmp_path / "in.png")
    asked = ask(image=str(path), outpaint=(32, 0, 16, 8), mask_blur=0, steps=4, strength=1.0, width=None, height=None)
    image = next(engine.generate(asked))
    assert (image.width, image.height) == (112, 72)
    made = array(image)
    assert np.array_equal(made[:64, 32:96], np.asarray(PILImage.open(path).convert("RGB")))
    mirrored = np.pad(np.asarray(PILImage.open(path).convert("RGB")), ((0, 8), (32, 16), (0, 0)), mode="symmetric")
    assert not np.array_equal(made[:, :32], mirrored[:, :32])
    again = Request(**{**image.metadata["request"], "model": asked.model})
    assert next(engine.generate(again)).pixels_sha256 == image.pixels_sha256
    # Of other sizes, too: it is made larger to whole latents, never scaled.
    PILImage.open(path).convert("RGB").crop((0, 0, 61, 59)).save(tmp_path / "odd.png")
    odd = next(
        engine.generate(
            ask(image=str(tmp_path / "odd.png"), outpaint=(3, 0, 0, 0), mask_blur=0, width=None, height=None)
        )
    )
    assert (odd.width, odd.height) == (64, 64)
    assert np.array_equal(array(odd)[:59, 3:64], np.asarray(PILImage.open(tmp_path / "odd.png").convert("RGB")))
    for values in (
        {"outpaint": 5},
        {"outpaint": (8, 8, 8)},
        {"outpaint": (8, 0, 0, 0)},
        {"outpaint": (-8, 0, 0, 0), "image": "x"},
    ):
        with pytest.raises(RequestError, match="outpaint"):
            ask(**values)


def test_outpainting_with_an_inpainting_checkpoint(engine: LocalEngine, ask: Ask, tmp_path: Path) -> None:
    path = controls.picture(tmp_path / "in.png")
    asked = ask("inpaint.safetensors", image=str(path), outpaint=(0, 16, 0, 0), width=None, height=None)
    assert next(engine.generate(asked)).height == 80


# Components of other checkpoints


def test_state_15_after_the_text_encoders_of_another_checkpoint_the_models_own_return(
    engine: LocalEngine, ask: Ask, tiny: Path
) -> None:
    own = next(engine.generate(ask())).pixels_sha256
    mixed = next(engine.generate(ask(text_encoder=str(tiny / "b.safetensors"))))
    assert next(engine.generate(ask())).pixels_sha256 == own
    pipe = oracle.pipeline("sd1", 1)
    other = checkpoints.modules("sd1", 2)["text_encoder"].half().float()
    pipe.text_encoder = oracle.aligned(other)
    assert mixed.pixels == oracle.pixels(pipe, "red apple", "", 2, 0, 7.0)
    b = engine.library.find(str(tiny / "b.safetensors"))
    recorded = mixed.metadata["model"]["components"]["text_encoder"]
    assert recorded == b.manifest.component("text_encoder").digest
    with pytest.raises(RequestError, match="is of sdxl"):
        next(engine.generate(ask(text_encoder=str(tiny / "xl.safetensors"))))


def test_what_follows_an_encoded_picture_is_kept_in_the_order_of_its_use(
    engine: LocalEngine, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a picture that the user gives, the text encoder comes next; after that of the hires fix, the UNet."""
    plan_uses, upcoming = stages.plan_uses, list[str]()

    def noting(*given: Any) -> list[Use]:
        uses = plan_uses(*given)
        if given[-1].variant.startswith("-encoder"):
            upcoming.append(uses[0].upcoming[0].split(" ")[0])
        return uses

    monkeypatch.setattr(stages, "plan_uses", noting)
    PILImage.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    next(engine.generate(ask(image=str(tmp_path / "red.png"), strength=0.9)))
    next(engine.generate(ask(hires_scale=1.5, hires_upscaler="lanczos")))
    assert upcoming == ["text_encoder", "unet"]
