"""A refiner computes the last steps of an image: pixels equal those of diffusers' two pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from support import checkpoints, oracle
from support.scale import thinned

import safelight
from safelight.errors import IntegrityError, ModelNotFoundError, RequestError
from safelight.request.job import Job
from safelight.request.results import Image, Progress
from safelight.workers.local_engine import LocalEngine

BASE, REFINER = 4, 5
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
}


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refiner")
    checkpoints.write_single(made / "base.safetensors", "sdxl", BASE)
    checkpoints.write_single(made / "refiner.safetensors", "sdxl-refiner", REFINER)
    checkpoints.write_single(made / "other.safetensors", "sdxl", REFINER)
    checkpoints.write_single(made / "sd1.safetensors", "sd1", BASE)
    values = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    PILImage.fromarray(values).resize((64, 64), PILImage.Resampling.BICUBIC).save(made / "picture.png")
    white = PILImage.new("L", (64, 64), 0)
    white.paste(255, (0, 0, 32, 64))
    white.save(made / "mask.png")
    return made


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    return oracle.pipeline("sdxl", BASE), oracle.refiner(REFINER)


def ask(folder: Path, **changes: Any) -> safelight.Request:
    values: dict[str, Any] = {"prompt": "red apple", "negative": "blue", "steps": 4, "seed": 11, "cfg": 5.0}
    values |= {"width": 64, "height": 64, "model": str(folder / "base.safetensors")}
    return safelight.Request(**(values | {"refiner": str(folder / "refiner.safetensors")} | changes))


def array(image: Image) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def theirs(pipes: tuple[Any, Any], sampler: str, steps: int, start: float, **call: Any) -> np.ndarray:
    torch.set_num_threads(1)
    base, refiner = pipes
    kind, settings = SCHEDULERS[sampler]
    generator = torch.Generator("cpu").manual_seed(11)
    both = {"num_inference_steps": steps, "guidance_scale": 5.0, "generator": generator}
    both |= {"prompt": "red apple", "negative_prompt": "blue"}
    if "image" in call:
        base = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)  # type: ignore[assignment]
    else:
        call |= {"width": 64, "height": 64}
    for pipe in (base, refiner):
        pipe.scheduler = kind.from_config({**oracle.SCHEDULE, **settings})
        pipe.set_progress_bar_config(disable=True)
    latents = base(**both, **call, denoising_end=start, output_type="latent").images
    refined = refiner(**both, image=latents, denoising_start=start, output_type="latent").images
    # The VAE is the base's: Safelight decodes with the VAE of the model that was asked for.
    decoded = base.vae.decode(refined / base.vae.config.scaling_factor, return_dict=False)[0]
    return np.asarray(base.image_processor.postprocess(decoded, output_type="pil")[0])


@pytest.mark.parametrize(
    ("steps", "start"),
    [(4, 0.5), (7, 0.8), (3, 0.7)],
    ids=["4 steps, refiner from 0.5", "7 steps, refiner from 0.8", "3 steps, refiner from 0.7"],
)
@pytest.mark.parametrize("sampler", thinned(SCHEDULERS, 2))
def test_pixels_are_those_of_diffusers(
    engine: LocalEngine, folder: Path, pipes: tuple[Any, Any], sampler: str, steps: int, start: float
) -> None:
    image = next(engine.generate(ask(folder, sampler=sampler, steps=steps, refiner_start=start)))
    assert np.array_equal(array(image), theirs(pipes, sampler, steps, start))


def test_from_a_picture(engine: LocalEngine, folder: Path, pipes: tuple[Any, Any]) -> None:
    picture = folder / "picture.png"
    right = theirs(pipes, "euler", 6, 0.7, image=PILImage.open(picture), strength=0.7)
    image = next(engine.generate(ask(folder, steps=6, refiner_start=0.7, image=str(picture), strength=0.7)))
    assert np.array_equal(array(image), right)


@pytest.mark.parametrize("negative", ["blue", ""], ids=["negative prompt", "none"])
def test_a_refiner_alone_changes_a_picture(
    engine: LocalEngine, folder: Path, pipes: tuple[Any, Any], negative: str
) -> None:
    torch.set_num_threads(1)
    picture, refiner = folder / "picture.png", pipes[1]
    refiner.scheduler = diffusers.EulerDiscreteScheduler.from_config(oracle.SCHEDULE)
    right = refiner(
        prompt="red apple",
        negative_prompt=negative,
        image=PILImage.open(picture),
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    request = ask(folder, model=str(folder / "refiner.safetensors"), refiner="", negative=negative)
    request = safelight.Request(**{**vars_of(request), "image": str(picture), "strength": 0.6, "steps": 5})
    assert np.array_equal(array(next(engine.generate(request))), np.asarray(right))


def vars_of(request: safelight.Request) -> dict[str, Any]:
    names = ("prompt", "negative", "steps", "seed", "cfg", "width", "height", "model", "refiner")
    return {name: getattr(request, name) for name in names}


def test_a_picture_with_less_noise_than_the_refiner_starts_with_is_the_refiners_alone(
    engine: LocalEngine, folder: Path
) -> None:
    """Only the VAE is then the model's, so both models have the same one here."""
    picture = str(folder / "picture.png")
    both = ask(folder, image=picture, strength=0.3, steps=10, refiner_start=0.2)
    alone = ask(folder, image=picture, strength=0.3, steps=10, refiner="", model=str(folder / "refiner.safetensors"))
    alone = safelight.Request(
        **{**vars_of(alone), "image": picture, "strength": 0.3, "vae": str(folder / "base.safetensors")}
    )
    assert np.array_equal(array(next(engine.generate(both))), array(next(engine.generate(alone))))


def test_what_a_mask_leaves_stays_and_the_refiner_draws_only_the_rest(engine: LocalEngine, folder: Path) -> None:
    picture, mask = folder / "picture.png", folder / "mask.png"
    given = {"image": str(picture), "mask": str(mask), "strength": 1.0, "mask_blur": 0}
    refined = array(next(engine.generate(ask(folder, **given, refiner_start=0.5))))
    plain = array(next(engine.generate(ask(folder, **given, refiner=""))))
    original = np.asarray(PILImage.open(picture).convert("RGB"))
    assert np.array_equal(refined[:, 32:], original[:, 32:])
    assert not np.array_equal(refined[:, :32], plain[:, :32])


def test_the_hires_fix_is_refined_in_its_second_pass(engine: LocalEngine, folder: Path) -> None:
    steps: list[Progress] = []
    request = ask(folder, steps=4, hires_scale=2, hires_strength=0.5, refiner_start=0.8, hires_steps=10)
    image = next(engine.generate(request, steps.append))
    denoised = [one for one in steps if one.stage == "denoise"]
    assert [one.step for one in denoised] == list(range(1, 10))
    assert {one.steps for one in denoised} == {9}
    plain = next(engine.generate(ask(folder, steps=4, hires_scale=2, hires_strength=0.5, hires_steps=10, refiner="")))
    assert plain.pixels_sha256 != image.pixels_sha256


def test_any_model_with_the_same_latents_can_refine(engine: LocalEngine, folder: Path) -> None:
    image = next(engine.generate(ask(folder, refiner=str(folder / "other.safetensors"), refiner_start=0.5)))
    assert image.metadata["refiner"]["name"] == "other"
    assert next(engine.generate(ask(folder, refiner=""))).pixels_sha256 != image.pixels_sha256


def test_too_late_a_start_is_said(engine: LocalEngine, folder: Path) -> None:
    image = next(engine.generate(ask(folder, steps=2, refiner_start=0.99, schedule="sgm_uniform")))
    assert any(one.startswith("refiner_start 0.99 leaves no step") for one in image.warnings)


def test_the_job_holds_the_refiner_by_content_and_the_picture_can_be_made_again(
    engine: LocalEngine, folder: Path, tmp_path: Path
) -> None:
    first = next(engine.generate(ask(folder)))
    stored = first.metadata
    assert stored["request"]["refiner"] == "refiner"
    assert stored["request"]["refiner_digest"] == stored["refiner"]["digest"]
    assert next(engine.run(Job.from_json(stored))).pixels_sha256 == first.pixels_sha256


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"refiner": "nothing-like-it"}, ModelNotFoundError, "nothing-like-it"),
        ({"refiner_digest": "0" * 64}, IntegrityError, "other content"),
        ({"refiner": "sd1.safetensors"}, RequestError, "cannot go on with the latents"),
        ({"clip_skip": 2}, RequestError, "layers"),
        ({"refiner_start": 1.0}, RequestError, "refiner_start"),
    ],
)
def test_what_cannot_be_is_refused(
    engine: LocalEngine, folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if str(changes.get("refiner", "")).endswith(".safetensors"):
        changes = {"refiner": str(folder / changes["refiner"])}
    with pytest.raises(error, match=message):
        next(engine.generate(ask(folder, **changes)))


def test_a_refiner_needs_an_image(engine: LocalEngine, folder: Path) -> None:
    with pytest.raises(RequestError, match="makes no images from text alone"):
        next(engine.generate(ask(folder, model=str(folder / "refiner.safetensors"), refiner="")))


def test_models_switch_within_the_least_memory(engine: LocalEngine, folder: Path, tmp_path: Path) -> None:
    right = next(engine.generate(ask(folder))).pixels_sha256
    small = safelight.open_engine(tmp_path, max_cache_ram_gb=0.0125)
    for _ in range(2):
        assert next(small.generate(ask(folder))).pixels_sha256 == right
    small.close()
