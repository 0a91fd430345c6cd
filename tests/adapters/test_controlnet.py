"""ControlNets: pixels equal those of diffusers' own pipelines, bit for bit; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image as PILImage
from support import checkpoints, controls, memory, oracle
from support.scale import thinned

import safelight
from safelight.errors import InputError, OutOfMemoryError, RequestError
from safelight.memory.budget import HOST
from safelight.memory.lease import Use
from safelight.memory.segments import component_key
from safelight.pipeline.stages import Task, describe_stage, plan_uses
from safelight.request.adapters import Control
from safelight.request.schema import Request
from safelight.workers.local_engine import LocalEngine

PIPELINES: dict[tuple[str, str], Any] = {
    ("sd1", "text"): diffusers.StableDiffusionControlNetPipeline,
    ("sd1", "image"): diffusers.StableDiffusionControlNetImg2ImgPipeline,
    ("sd1", "mask"): diffusers.StableDiffusionControlNetInpaintPipeline,
    ("sdxl", "text"): diffusers.StableDiffusionXLControlNetPipeline,
    ("sdxl", "image"): diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", "mask"): diffusers.StableDiffusionXLControlNetInpaintPipeline,
}
FILES = {"sd1": ("a.safetensors", 1), "sdxl": ("xl.safetensors", 4)}


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("controls")
    controls.picture(made / "edges.png", 9)
    controls.picture(made / "depth.png", 10)
    controls.picture(made / "start.png", 3)
    mask = PILImage.new("L", (64, 64), 0)
    mask.paste(255, (16, 8, 48, 40))
    mask.save(made / "mask.png")
    for base in ("sd1", "sdxl"):
        controls.write(made / f"{base}.safetensors", base, 31)
    controls.write(made / "second.safetensors", "sd1", 32, ldm=True)
    return made


def opened(path: Path) -> PILImage.Image:
    return PILImage.open(path).convert("RGB")


def theirs(base: str, task: str, folder: Path, nets: list[int], **call: Any) -> np.ndarray:
    plain = oracle.pipeline(base, FILES[base][1])
    made = [oracle.aligned(controls.module(base, seed)) for seed in nets]
    net = made[0] if len(made) == 1 else MultiControlNetModel(made)
    parts = {name: part for name, part in plain.components.items() if name not in ("image_encoder", "force_zeros")}
    kind = PIPELINES[base, task]
    if base == "sdxl":
        parts = {name: part for name, part in parts.items() if name != "feature_extractor"}
        pipe = kind(**parts, controlnet=net, add_watermarker=False)
    else:
        pipe = kind(**parts, controlnet=net, requires_safety_checker=False)
    shown = [opened(folder / name) for name in ("edges.png", "depth.png")[: len(nets)]]
    given: dict[str, Any] = {"control_image": shown[0] if len(shown) == 1 else shown}
    if task == "text":
        given = {"image": given["control_image"]}
    else:
        given |= {"image": opened(folder / "start.png"), "strength": 0.6}
    if task == "mask":
        given |= {"mask_image": PILImage.open(folder / "mask.png")}
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    values = {"num_inference_steps": 5, "guidance_scale": 5.0, "width": 64, "height": 64, **given, **call}
    made_image = pipe("red apple", negative_prompt="blue", generator=torch.Generator("cpu").manual_seed(11), **values)
    return np.asarray(made_image.images[0])


def ours(engine: LocalEngine, tiny: Path, base: str, task: str, folder: Path, *asked: Control) -> np.ndarray:
    more: dict[str, Any] = {}
    if task != "text":
        more = {"image": str(folder / "start.png"), "strength": 0.6}
    if task == "mask":
        more |= {"mask": str(folder / "mask.png"), "mask_blur": 0}
    request = Request(
        "red apple", str(tiny / FILES[base][0]), "blue", 11, 5, 64, 64, 5.0, controls=tuple(asked), **more
    )
    image = next(engine.generate(request))
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def one(folder: Path, base: str, **more: Any) -> Control:
    return Control(str(folder / f"{base}.safetensors"), str(folder / "edges.png"), **more)


@pytest.mark.parametrize("base", thinned(["sdxl", "sd1"]))
@pytest.mark.parametrize("task", thinned(["mask", "text", "image"]))
def test_pixels_are_those_of_diffusers(engine: LocalEngine, tiny: Path, folder: Path, base: str, task: str) -> None:
    made = ours(engine, tiny, base, task, folder, one(folder, base, weight=0.8))
    right = theirs(base, task, folder, [31], controlnet_conditioning_scale=0.8)
    if task == "mask":
        inside = np.asarray(PILImage.open(folder / "mask.png"))[..., None] >= 128
        right = np.where(inside, right, np.asarray(opened(folder / "start.png")))
    assert np.array_equal(made, right)


def test_a_part_of_the_steps(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    made = ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1", start=0.2, end=0.7))
    right = theirs("sd1", "text", folder, [31], control_guidance_start=0.2, control_guidance_end=0.7)
    assert np.array_equal(made, right)
    assert not np.array_equal(made, ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1")))


def test_two_at_once(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    second = Control(str(folder / "second.safetensors"), str(folder / "depth.png"), 0.5)
    made = ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1"), second)
    right = theirs("sd1", "text", folder, [31, 32], controlnet_conditioning_scale=[1.0, 0.5])
    assert np.array_equal(made, right)


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_more_control_is_guess_mode(engine: LocalEngine, tiny: Path, folder: Path, base: str) -> None:
    made = ours(engine, tiny, base, "text", folder, one(folder, base, mode="more_control"))
    assert np.array_equal(made, theirs(base, "text", folder, [31], guess_mode=True))


def test_modes_differ(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    made = [
        ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1", mode=mode)).tobytes()
        for mode in ("balanced", "more_prompt", "more_control", "unbalanced")
    ]
    assert len(set(made)) == 4


def test_streamed_through_little_memory_it_is_the_same(
    root: Path, engine: LocalEngine, tiny: Path, folder: Path
) -> None:
    """UNet and ControlNet in part at the same time."""
    right = ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1"))
    small = safelight.open_engine(root, max_cache_ram_gb=0.016)
    held = small.resources.residency
    standing = held.ledger.reserved(HOST)
    assert np.array_equal(ours(small, tiny, "sd1", "text", folder, one(folder, "sd1")), right)
    assert held.ledger.reserved(HOST) == standing
    assert all(usage.leases == 0 for usage in held.usage_by_component())


def test_one_that_leaves_is_gone(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    plain = ours(engine, tiny, "sd1", "text", folder)
    assert not np.array_equal(plain, ours(engine, tiny, "sd1", "text", folder, one(folder, "sd1")))
    assert np.array_equal(plain, ours(engine, tiny, "sd1", "text", folder))


def test_in_the_library_it_has_a_name_and_a_digest(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    added = engine.catalog.adapters.add(folder / "second.safetensors", "second")
    assert (added.kind, added.base) == ("controlnet", "")
    asked = Control("second", str(folder / "edges.png"), preprocessor="canny")
    image = next(
        engine.generate(Request("x", str(tiny / "a.safetensors"), steps=2, width=64, height=64, controls=(asked,)))
    )
    [recorded] = image.metadata["request"]["controls"]
    assert recorded["digest"] == added.digest
    again = Request(**{**image.metadata["request"], "model": str(tiny / "a.safetensors")})
    assert next(engine.generate(again)).pixels_sha256 == image.pixels_sha256


def test_pictures_of_another_shape(engine: LocalEngine, tiny: Path, folder: Path, tmp_path: Path) -> None:
    """Stretched, cut, or with black around: each is the ControlNet shown just that."""
    wide = PILImage.open(folder / "edges.png").convert("RGB").resize((128, 64))
    wide.save(tmp_path / "wide.png")
    black = PILImage.new("RGB", (64, 64))
    black.paste(wide.resize((64, 32), PILImage.Resampling.LANCZOS), (0, 16))
    right = {
        "just_resize": wide.resize((64, 64), PILImage.Resampling.LANCZOS),
        "crop_resize": wide.crop((32, 0, 96, 64)),
        "fill_resize": black,
    }
    net = str(folder / "sd1.safetensors")
    for how, shown in right.items():
        shown.save(tmp_path / "shown.png")
        made = ours(engine, tiny, "sd1", "text", folder, Control(net, str(tmp_path / "wide.png"), resize_mode=how))
        assert np.array_equal(
            made, ours(engine, tiny, "sd1", "text", folder, Control(net, str(tmp_path / "shown.png")))
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "ink"}, "is a lora, not a ControlNet"),
        ({"name": "XL"}, "reads text of width"),
        ({"name": "edges"}, "has blocks of widths"),
        ({"name": "none-such"}, "none-such"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    engine: LocalEngine, tiny: Path, folder: Path, change: dict[str, str], says: str
) -> None:
    name = str(folder / "sdxl.safetensors") if change["name"] == "XL" else change["name"]
    asked = Request("x", str(tiny / "a.safetensors"), controls=(Control(name, str(folder / "edges.png")),))
    with pytest.raises(InputError, match=says):
        next(engine.generate(asked))


@pytest.mark.parametrize(
    "values",
    [
        {"weight": float("nan")},
        {"start": 0.5, "end": 0.5},
        {"mode": "loud"},
        {"preprocessor": "openpose"},
        {"image": ""},
        {"low": -1},
    ],
)
def test_values_that_are_not_allowed(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="controls"):
        Control(**{"name": "x", "image": "y", **values})


def test_a_truncated_one_is_an_error_and_the_next_job_is_right(
    engine: LocalEngine, tiny: Path, folder: Path, tmp_path: Path
) -> None:
    plain = ours(engine, tiny, "sd1", "text", folder)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "sd1.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        ours(engine, tiny, "sd1", "text", folder, Control(str(cut), str(folder / "edges.png")))
    assert np.array_equal(plain, ours(engine, tiny, "sd1", "text", folder))


def test_checkpoints_are_tiny() -> None:
    assert checkpoints.configs("sd1")["unet"] == controls.config("sd1").encoder


def test_what_comes_beside_leaves_the_least_for_the_others(engine: LocalEngine, tiny: Path, folder: Path) -> None:
    """A ControlNet is leased first; were it to take all room, the UNet could not be leased at all."""
    model = engine.library.find(str(tiny / "a.safetensors"))
    unet = model.manifest.component("unet")
    net = engine.catalog.adapters.find(str(folder / "sd1.safetensors")).component
    parts = [(component, torch.float32) for component in (unet, net, net)]
    task = Task("denoise", 64 * 64, 2)
    uses = plan_uses(model, engine.resources, parts, describe_stage(parts, engine.resources.run_settings, task), task)
    least = [engine.resources.residency.planner.min_weight_bytes(component, dtype) for component, dtype in parts]
    assert [use.min_bytes_of_later_leases for use in uses] == [0, least[0], least[0] + least[1]]
    assert [bool(use.working_bytes) for use in uses] == [False, False, True]
    assert uses[1].upcoming[0] == component_key(unet, torch.float32)
    small = memory.host(least[0] + least[1])
    with (
        small.lease(net, torch.float32, Use(min_bytes_of_later_leases=least[0])),
        small.lease(unet, torch.float32) as lease,
    ):
        assert lease.ring is not None
    with pytest.raises(OutOfMemoryError), small.lease(net, torch.float32), small.lease(unet, torch.float32):
        pass
