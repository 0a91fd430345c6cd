"""Checkpoints that change an image as the prompt says (instruct-pix2pix): pixels equal those of diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from support import checkpoints, controls, oracle
from support.scale import thinned

import safelight
from safelight.errors import RequestError
from safelight.families.family_model import Call, ControlCall, Tensors, family_model
from safelight.families.registry import family
from safelight.pictures import chunks
from safelight.pipeline import guidance
from safelight.request.adapters import Control
from safelight.request.results import Progress
from safelight.workers.local_engine import LocalEngine

SEED = 7
SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
}
OFF = (1.0, 1.5)
"""With a guidance scale of 1, diffusers computes one row: the prompt and the image."""


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of eight channels, a picture, and a mask."""
    made = tmp_path_factory.mktemp("instructions")
    checkpoints.write_single(made / "eight.safetensors", "sd1", SEED, in_channels=8)
    values = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    picture = PILImage.fromarray(values)
    picture.resize((64, 64), PILImage.Resampling.BICUBIC).save(made / "picture.png")
    picture.resize((72, 48), PILImage.Resampling.BICUBIC).save(made / "wide.png")
    PILImage.new("L", (64, 64), 255).save(made / "mask.png")
    return made


@pytest.fixture(scope="module")
def pipe() -> Any:
    plain = oracle.pipeline("sd1", SEED)
    for role, module in checkpoints.modules("sd1", SEED, in_channels=8).items():
        setattr(plain, role, oracle.aligned(module))
    made: Any = diffusers.StableDiffusionInstructPix2PixPipeline.from_pipe(plain)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipe: Any, picture: Path, sampler: str, scales: tuple[float, float], **call: Any) -> np.ndarray:
    torch.set_num_threads(1)
    pipe.scheduler = SCHEDULERS[sampler].from_config(oracle.SCHEDULE)
    call = {"prompt": "red apple", "negative_prompt": "blue", **call}
    made = pipe(
        image=PILImage.open(picture).convert("RGB"),
        num_inference_steps=4,
        guidance_scale=scales[0],
        image_guidance_scale=scales[1],
        generator=torch.Generator("cpu").manual_seed(11),
        **call,
    )
    return np.asarray(made.images[0])


def ask(folder: Path, **changes: Any) -> safelight.Request:
    values: dict[str, Any] = {"prompt": "red apple", "negative": "blue", "steps": 4, "seed": 11, "cfg": 5.0}
    values |= {"model": str(folder / "eight.safetensors"), "image": str(folder / "picture.png"), **changes}
    return safelight.Request(**values)


def ours(engine: LocalEngine, folder: Path, **changes: Any) -> np.ndarray:
    image = next(engine.generate(ask(folder, **changes)))
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


CASES = [
    ("euler", 5.0, 1.0),
    ("euler", *OFF),
    ("euler_a", *OFF),
    *((sampler, *scales) for scales in ((7.0, 1.5), (3.0, 1.2)) for sampler in SCHEDULERS),
]


@pytest.mark.parametrize(
    ("sampler", "cfg", "image_cfg"),
    thinned(CASES, 6, unpack=True),
    ids=[f"{sampler}, guidance {cfg:g}, image guidance {image_cfg:g}" for sampler, cfg, image_cfg in CASES],
)
def test_pixels_are_those_of_diffusers(
    engine: LocalEngine, folder: Path, pipe: Any, sampler: str, cfg: float, image_cfg: float
) -> None:
    right = theirs(pipe, folder / "picture.png", sampler, (cfg, image_cfg))
    assert np.array_equal(ours(engine, folder, sampler=sampler, cfg=cfg, image_cfg=image_cfg), right)


def test_a_picture_of_another_size(engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = theirs(pipe, folder / "wide.png", "euler", (5.0, 1.5))
    assert np.array_equal(ours(engine, folder, image=str(folder / "wide.png")), right)


def test_a_prompt_that_changes_between_steps(engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """All four steps are computed, so the fourth has the other prompt."""

    def change(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            values["prompt_embeds"] = pipe._encode_prompt("green apple", "cpu", 1, True, "blue")
        return values

    more = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.no_grad():
        right = theirs(pipe, folder / "picture.png", "euler", (5.0, 1.5), **more)
    assert np.array_equal(ours(engine, folder, prompt="[red:green:3] apple"), right)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": ""}, "image='': is missing: .* is a checkpoint for instruct-pix2pix, which needs an image"),
        ({"mask": "mask.png"}, "mask=.* has no effect"),
        ({"outpaint": (8, 0, 0, 0)}, "outpaint=.* has no effect"),
        ({"strength": 0.5}, "strength=0.5: has no effect: .*; leave it at 0.75"),
        ({"image_cfg": 0.9}, "image_cfg=0.9: must be a number from 1 to 100"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(
    engine: LocalEngine, folder: Path, changes: dict[str, Any], says: str
) -> None:
    if "mask" in changes:
        changes = {"mask": str(folder / changes["mask"])}
    with pytest.raises(RequestError, match=says):
        ours(engine, folder, **changes)


@pytest.mark.parametrize("name", ["a.safetensors", "inpaint.safetensors"])
def test_other_models_refuse_image_guidance(engine: LocalEngine, tiny: Path, folder: Path, name: str) -> None:
    more = {"mask": str(folder / "mask.png")} if name.startswith("inpaint") else {}
    with pytest.raises(RequestError, match=r"image_cfg=2\.0: has no effect: .* no guidance by the image"):
        ours(engine, folder, model=str(tiny / name), image_cfg=2.0, **more)


def test_the_same_channels_in_another_family_are_refused(engine: LocalEngine, folder: Path) -> None:
    path = checkpoints.write_single(folder / "eight-xl.safetensors", "sdxl", SEED, in_channels=8)
    with pytest.raises(RequestError, match="instruct-pix2pix, which cannot be run yet"):
        ours(engine, folder, model=str(path))


def test_switching_to_a_plain_model_and_back_changes_no_pixel(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    plain = {"model": str(tiny / "a.safetensors"), "image": "", "width": 64, "height": 64}
    alone = ours(engine, folder, **plain)
    eight = ours(engine, folder)
    assert np.array_equal(ours(engine, folder, **plain), alone)
    assert np.array_equal(ours(engine, folder), eight)
    fresh = safelight.open_engine(folder / "root", attention_type="torch-sdp", threads=1)
    assert np.array_equal(ours(fresh, folder), eight)  # type: ignore[arg-type]
    fresh.close()


def test_it_is_made_again_from_its_metadata(engine: LocalEngine, folder: Path) -> None:
    image = next(engine.generate(ask(folder, image_cfg=2.0)))
    assert (image.metadata["request"]["image_cfg"], image.metadata["request"]["strength"]) == (2.0, 0.75)
    assert "Image CFG scale: 2.0" in chunks.parameters(image.metadata)
    again = safelight.Request(**{**image.metadata["request"], "model": str(folder / "eight.safetensors")})
    assert next(engine.generate(again)).pixels_sha256 == image.pixels_sha256


def test_progress_counts_every_step(engine: LocalEngine, folder: Path) -> None:
    seen: list[Progress] = []
    next(engine.generate(ask(folder), seen.append))
    assert [(one.step, one.steps) for one in seen if one.stage == "denoise"] == [(n, 4) for n in range(1, 5)]


def test_a_controlnet_beside_it(engine: LocalEngine, folder: Path) -> None:
    net = controls.write(folder / "net.safetensors", "sd1", 31)
    plain, made = ours(engine, folder), []
    for more in ({"weight": 0.0}, {"weight": 0.0, "mode": "unbalanced"}, {}, {"mode": "unbalanced"}):
        control = Control(str(net), str(folder / "picture.png"), **more)  # type: ignore[arg-type]
        made.append(ours(engine, folder, controls=(control,)))
    assert np.array_equal(made[0], plain)
    assert np.array_equal(made[1], plain)
    assert len({one.tobytes() for one in made[1:]}) == 3


def test_a_controlnet_that_ignores_the_negative_prompt_is_given_the_prompt(
    engine: LocalEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = controls.write(folder / "other.safetensors", "sd1", 31)
    control = Control(str(net), str(folder / "picture.png"), mode="unbalanced")
    given: list[torch.Tensor] = []
    model = family_model(family("sd1"))
    right = model.control

    def watched(bound: Any, denoiser: Any, call: Call, how: ControlCall) -> Tensors:
        given.append(call.condition["hidden"])
        return right(bound, denoiser, call, how)

    monkeypatch.setattr(model, "control", watched)
    for more in ({}, {"negative": "green"}, {"prompt": "green apple"}):
        ours(engine, folder, steps=2, controls=(control,), **more)
    assert all(len(hidden) == 1 for hidden in given)
    assert torch.equal(given[0], given[2])
    assert not torch.equal(given[0], given[4])


def test_memory_for_three_rows_is_measured_apart(root: Path, tiny: Path, folder: Path) -> None:
    engine = safelight.open_engine(root)
    ours(engine, folder)
    ours(engine, folder, model=str(tiny / "a.safetensors"), image="", width=64, height=64)
    measured = engine.resources.working_memory_estimator._measured
    sizes = {name.split()[0]: set(at) for name, at in measured.items() if name.startswith("unet")}
    assert sizes == {"unet-3rows": {64 * 64 * 3 // 2}, "unet": {64 * 64}}


def test_rows_of_each_guidance() -> None:
    one, other = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    condition = guidance.Condition({"hidden": one}, {"hidden": other})
    for kind, scale, texts, inputs, alone in (
        ("none", 7.0, [1], [1], [1]),
        ("classifier_free", 1.0, [1], [1], [1]),
        ("classifier_free", 7.0, [2, 1], [1, 1], [0, 1]),
        ("classifier_free_from_prompt", 7.0, [1, 2], [1, 1], [1, 0]),
        ("image_and_text", 1.0, [1], [1], [1]),
        ("image_and_text", 7.0, [1, 2, 2], [1, 1, 0], [1, 0, 0]),
    ):
        made = guidance.make_guidance(kind, scale, 1.5)  # type: ignore[arg-type]
        rows = torch.cat([tensors["hidden"] for tensors in made.conditions_of_rows(condition)])
        assert rows.flatten().tolist() == texts
        assert made.batch_extra_channels([one])[0].flatten().tolist() == inputs
        assert made.pad_to_rows(one).flatten().tolist() == alone
        assert rows[made.prompt_row].tolist() == [[1.0]]
