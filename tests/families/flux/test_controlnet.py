"""FLUX.1's ControlNets: pixels equal those of diffusers' pipelines, bit for bit; misfits are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support import controls, flow_controls, flux, memory
from support.oracle import aligned
from support.scale import thinned

import safelight
from safelight.catalog.identify import identify
from safelight.cli import values
from safelight.errors import InputError, RequestError
from safelight.families.family_model import Call, ControlCall
from safelight.request.adapters import Control
from safelight.server.apis import a1111_fields
from safelight.workers.local_engine import LocalEngine

SEED = 5
SIZE = {"width": 64, "height": 48}
PIPELINES: dict[str, Any] = {
    "text": diffusers.FluxControlNetPipeline,
    "image": diffusers.FluxControlNetImg2ImgPipeline,
    "mask": diffusers.FluxControlNetInpaintPipeline,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ControlNets and pictures."""
    made = tmp_path_factory.mktemp("flux")
    flux.write_folder(made / "model", SEED)
    for form in flow_controls.FLUX_NETS:
        flow_controls.write(made / f"{form}.safetensors", flow_controls.flux_net(form))
    for name, seed in (("edges", 9), ("depth", 10), ("start", 3)):
        path = controls.picture(made / f"{name}.png", seed)
        Image.open(path).resize((64, 48)).save(path)
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 8, 48, 40))
    mask.save(made / "mask.png")
    return made


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux.pipeline(SEED)


def theirs(pipe: Any, folder: Path, task: str, *forms: str, **call: Any) -> np.ndarray:
    nets: list[Any] = [aligned(flow_controls.flux_net(form)) for form in forms]
    parts = {name: one for name, one in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    other = PIPELINES[task](**parts, controlnet=nets[0] if len(nets) == 1 else FluxMultiControlNetModel(nets))
    other.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    shown = [Image.open(folder / f"{name}.png") for name in ("edges", "depth")[: len(nets)]]
    given: dict[str, Any] = {"control_image": shown[0] if len(nets) == 1 else shown, **SIZE}
    given |= {"num_inference_steps": 4, "guidance_scale": 3.5, "controlnet_conditioning_scale": 1.0}
    if task != "text":
        given |= {"image": Image.open(folder / "start.png"), "strength": 0.5}
    if task == "mask":
        given["mask_image"] = Image.open(folder / "mask.png")
    generator = torch.Generator("cpu").manual_seed(11)
    return np.asarray(other("a red apple", generator=generator, **given | call).images[0])


def ours(engine: LocalEngine, folder: Path, task: str, *asked: Control) -> np.ndarray:
    more: dict[str, Any] = {} if task == "text" else {"image": str(folder / "start.png"), "strength": 0.5}
    if task == "mask":
        more |= {"mask": str(folder / "mask.png"), "mask_blur": 0}
    request = safelight.Request(
        "a red apple", str(folder / "model"), seed=11, steps=4, controls=tuple(asked), **SIZE, **more
    )
    return np.frombuffer(next(engine.generate(request)).pixels, np.uint8).reshape(48, 64, 3)


def net(folder: Path, form: str, picture: str = "edges", **more: Any) -> Control:
    return Control(str(folder / f"{form}.safetensors"), str(folder / f"{picture}.png"), **more)


@pytest.mark.parametrize("form", thinned(["latents", "fewer", "pixels"]))
def test_text_to_image(form: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = theirs(pipe, folder, "text", form, controlnet_conditioning_scale=0.8)
    assert np.array_equal(ours(shared_engine, folder, "text", net(folder, form, weight=0.8)), right)
    assert not np.array_equal(ours(shared_engine, folder, "text"), right)


@pytest.mark.parametrize(
    ("task", "form"),
    [("image", "latents"), ("mask", "latents"), *thinned([("image", "pixels"), ("mask", "pixels")], 0, unpack=True)],
)
def test_pictures(task: str, form: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = theirs(pipe, folder, task, form)
    if task == "mask":
        inside = np.asarray(Image.open(folder / "mask.png"))[..., None] >= 128
        right = np.where(inside, right, np.asarray(Image.open(folder / "start.png")))
    assert np.array_equal(ours(shared_engine, folder, task, net(folder, form)), right)


@pytest.mark.parametrize("union_type", ["canny", "low_quality"])
def test_a_union_is_told_the_type_of_the_picture(
    union_type: str, shared_engine: LocalEngine, folder: Path, pipe: Any
) -> None:
    number = {"canny": 0, "low_quality": 6}[union_type]
    made = ours(shared_engine, folder, "text", net(folder, "union", union_type=union_type))
    assert np.array_equal(made, theirs(pipe, folder, "text", "union", control_mode=number))


def test_the_command_line_and_a1111_name_the_type() -> None:
    assert values.control("union:in.png:type=low_quality", None).union_type == "low_quality"
    unit = {"model": "union", "image": "x", "union_control_type": "OpenPose"}
    asked = a1111_fields.TextToImage(alwayson_scripts={"controlnet": {"args": [unit]}}).given()
    assert asked["controls"][0].union_type == "pose"


def test_a_preprocessor_names_the_type(shared_engine: LocalEngine, folder: Path) -> None:
    asked = net(folder, "union", preprocessor="canny")
    request = safelight.Request("x", str(folder / "model"), steps=1, controls=(asked,), **SIZE)
    image = next(shared_engine.generate(request))
    assert image.metadata["request"]["controls"][0]["union_type"] == "canny"


def test_a_part_of_the_steps(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    made = ours(shared_engine, folder, "text", net(folder, "latents", start=0.2, end=0.8))
    right = theirs(pipe, folder, "text", "latents", control_guidance_start=0.2, control_guidance_end=0.8)
    assert np.array_equal(made, right)
    assert not np.array_equal(made, ours(shared_engine, folder, "text", net(folder, "latents")))


@pytest.mark.full
def test_two_at_once(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    made = ours(shared_engine, folder, "text", net(folder, "latents"), net(folder, "latents", "depth", weight=0.5))
    right = theirs(pipe, folder, "text", "latents", "latents", controlnet_conditioning_scale=[1.0, 0.5])
    assert np.array_equal(made, right)


@pytest.mark.full
def test_two_of_different_lengths(shared_engine: LocalEngine, folder: Path) -> None:
    """diffusers drops the outputs that the shorter one does not have; here each reaches all blocks."""
    both = (net(folder, "latents"), net(folder, "pixels", "depth"))
    made = [ours(shared_engine, folder, "text", *asked).tobytes() for asked in (both, both[:1], both[1:], ())]
    assert len(set(made)) == 4


def test_streamed_through_the_least_memory_it_is_the_same(root: Path, folder: Path) -> None:
    transformer = memory.manifest(folder / "model").component("transformer")
    own = safelight.open_engine(root).catalog.adapters.find(str(folder / "union.safetensors")).component
    chance = torch.Generator().manual_seed(1)
    texts = {name: torch.randn(size, generator=chance) for name, size in (("hidden", (1, 8, 32)), ("pooled", (1, 64)))}
    call = Call(torch.randn(1, 16, 6, 8, generator=chance), torch.tensor(500.0), texts, guidance=3.5)
    how = ControlCall(torch.randn(1, 12, 64, generator=chance), union_type="pose")
    resident, streamed = (
        flow_controls.predicted("flux", (transformer, own), call, how, streamed) for streamed in (False, True)
    )
    assert torch.equal(streamed, resident)
    assert not torch.equal(
        flow_controls.predicted("flux", (transformer, own), call, replace(how, weight=0.5), True), resident
    )


def test_bf16(tmp_path: Path, folder: Path) -> None:
    """The noise is drawn in fp32 for every dtype, so the test compares fp32 with bf16, not with diffusers."""
    engine = safelight.open_engine(tmp_path / "root")
    request = safelight.Request(
        "x", str(folder / "model"), steps=1, controls=(net(folder, "latents"),), precision="bf16", **SIZE
    )
    assert len(next(engine.generate(request)).pixels) == 64 * 48 * 3


def test_the_names_of_xlabs(root: Path, folder: Path, tmp_path: Path) -> None:
    save_file(flow_controls.xlabs_names(flow_controls.flux_net("pixels")), tmp_path / "xlabs.safetensors")
    adapters = safelight.open_engine(root).catalog.adapters
    one, other = adapters.add(tmp_path / "xlabs.safetensors"), adapters.add(folder / "pixels.safetensors")
    assert (one.kind, one.base) == ("controlnet", "flux")
    assert one.digest == other.digest


@pytest.mark.parametrize("form", flow_controls.FLUX_NETS)
def test_it_is_recognised(form: str, folder: Path) -> None:
    found = identify(folder / f"{form}.safetensors")
    assert (found.kind, found.base) == ("controlnet", "flux")


def test_a_missing_tensor_is_named(root: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "latents.safetensors")
    del tensors["controlnet_single_blocks.0.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"FLUX\.1 ControlNet.*controlnet_single_blocks\.0\.bias"):
        safelight.open_engine(root).catalog.adapters.add(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("form", "more", "says"),
    [
        ("latents", {"mode": "more_prompt"}, "ControlNets for flux have the mode balanced"),
        ("latents", {"union_type": "canny"}, "reads one type of pictures; leave union_type out"),
        ("union", {}, "union_type must be one of canny, tile, depth, blur, pose, gray, low_quality"),
        ("union", {"union_type": "normal"}, "union_type must be one of canny"),
        ("sd1", {}, "is a ControlNet of another architecture than"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    form: str, more: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path
) -> None:
    if form == "sd1":
        controls.write(folder / "sd1.safetensors")
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, "text", net(folder, form, **more))


def test_another_family_refuses_it(shared_engine: LocalEngine, tiny: Path, folder: Path) -> None:
    asked = safelight.Request("x", str(tiny / "a.safetensors"), controls=(net(folder, "latents"),))
    with pytest.raises(RequestError, match="is a ControlNet of another architecture than"):
        next(shared_engine.generate(asked))
