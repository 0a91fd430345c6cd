"""Z-Image's ControlNets: pixels equal those of diffusers' pipeline, bit for bit; misfits are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import controls, flow_controls, memory, zimage
from support.oracle import aligned
from support.scale import thinned

import safelight
from safelight.catalog.identify import identify
from safelight.errors import InputError, RequestError
from safelight.families.family_model import Call, ControlCall
from safelight.families.zimage.controlnet import places
from safelight.request.adapters import Control
from safelight.workers.local_engine import LocalEngine

SEED = 5
SIZE = {"width": 64, "height": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ControlNets and pictures."""
    made = tmp_path_factory.mktemp("zimage")
    zimage.write_folder(made / "model", SEED)
    for version in flow_controls.ZIMAGE_NETS:
        flow_controls.write(made / f"{version}.safetensors", flow_controls.zimage_net(version))
    for name, seed in (("edges", 9), ("depth", 10), ("start", 3)):
        path = controls.picture(made / f"{name}.png", seed)
        Image.open(path).resize((64, 48)).save(path)
    return made


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zimage.pipeline(SEED)


def theirs(pipe: Any, folder: Path, version: str, **call: Any) -> bytes:
    net: Any = aligned(flow_controls.zimage_net_of_diffusers(version))
    other = diffusers.ZImageControlNetPipeline(**pipe.components, controlnet=net)
    other.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    given = {"control_image": Image.open(folder / "edges.png"), "num_inference_steps": 3, "guidance_scale": 0.0, **SIZE}
    generator = torch.Generator("cpu").manual_seed(11)
    return (
        other("a red apple", generator=generator, **given | {"controlnet_conditioning_scale": 1.0} | call)
        .images[0]
        .tobytes()
    )


def ours(engine: LocalEngine, folder: Path, *asked: Control, **changes: Any) -> bytes:
    values = {"seed": 11, "steps": 3, **SIZE, **changes}
    return next(
        engine.generate(safelight.Request("a red apple", str(folder / "model"), controls=asked, **values))
    ).pixels


def net(folder: Path, version: str, picture: str = "edges", **more: Any) -> Control:
    return Control(str(folder / f"{version}.safetensors"), str(folder / f"{picture}.png"), **more)


@pytest.mark.parametrize("version", thinned(flow_controls.ZIMAGE_NETS))
def test_text_to_image(version: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = theirs(pipe, folder, version, controlnet_conditioning_scale=0.8)
    assert ours(shared_engine, folder, net(folder, version, weight=0.8)) == right
    assert ours(shared_engine, folder) != right


def test_classifier_free_guidance(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = theirs(pipe, folder, "2.1", guidance_scale=2.5, negative_prompt="a green pear")
    asked = net(folder, "2.1")
    assert ours(shared_engine, folder, asked, cfg=3.5, negative="a green pear") == right
    unbalanced = ours(shared_engine, folder, replace(asked, mode="unbalanced"), cfg=3.5, negative="a green pear")
    assert unbalanced not in (right, ours(shared_engine, folder, cfg=3.5, negative="a green pear"))


@pytest.mark.full
def test_what_diffusers_lacks_changes_the_picture(shared_engine: LocalEngine, folder: Path) -> None:
    """Image to image, a part of the steps, and two at once."""
    start = {"image": str(folder / "start.png"), "strength": 0.7}
    one, other = net(folder, "1"), net(folder, "2.1", "depth", weight=0.5)
    drawn = [ours(shared_engine, folder, *asked, **start) for asked in ((), (one,), (one, other), (other,))]
    drawn += [ours(shared_engine, folder, replace(one, **part)) for part in ({"end": 0.4}, {"start": 0.4}, {})]
    assert len(set(drawn)) == 7
    assert ours(shared_engine, folder, replace(one, weight=0.0)) == ours(shared_engine, folder)


def test_places() -> None:
    """The settings of the published versions 1, 2.x and 2.1 lite."""
    assert [places(30, count) for count in (6, 15, 3)] == [list(range(0, 30, step)) for step in (5, 2, 10)]


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_streamed_through_the_least_memory_it_is_the_same(version: str, root: Path, folder: Path) -> None:
    """The transformer's blocks, with which the ControlNet computes too, are streamed for both."""
    transformer = memory.manifest(folder / "model").component("transformer")
    own = safelight.open_engine(root).catalog.adapters.find(str(folder / f"{version}.safetensors")).component
    chance = torch.Generator().manual_seed(1)
    texts = {"hidden": torch.randn(2, 9, 32, generator=chance), "length": torch.tensor([9, 5])}
    call = Call(torch.randn(2, 16, 6, 8, generator=chance), torch.tensor(500.0), texts)
    how = ControlCall(torch.randn(1, 16, 6, 8, generator=chance))
    resident, streamed = (
        flow_controls.predicted("z-image", (transformer, own), call, how, streamed) for streamed in (False, True)
    )
    assert torch.equal(streamed, resident)
    assert not torch.equal(
        flow_controls.predicted("z-image", (transformer, own), call, replace(how, weight=0.5), True), resident
    )


def test_nothing_of_the_model_stays_with_the_controlnet(shared_engine: LocalEngine, folder: Path) -> None:
    image = next(
        shared_engine.generate(
            safelight.Request("x", str(folder / "model"), steps=1, controls=(net(folder, "2.1"),), **SIZE)
        )
    )
    assert image.metadata["repairs"] == []
    assert shared_engine.resources.skeletons.check() == []


@pytest.mark.parametrize("version", flow_controls.ZIMAGE_NETS)
def test_it_is_recognised(version: str, folder: Path) -> None:
    found = identify(folder / f"{version}.safetensors")
    assert (found.kind, found.base) == ("controlnet", "z-image")


def test_a_missing_tensor_is_named(root: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "2.1.safetensors")
    del tensors["control_layers.1.after_proj.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"Z-Image ControlNet.*control_layers\.1\.after_proj\.bias"):
        safelight.open_engine(root).catalog.adapters.add(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mode": "more_control"}, "ControlNets for z-image have the mode balanced, unbalanced"),
        ({"union_type": "canny"}, "reads one type of pictures; leave union_type out"),
        ({"name": "flux"}, "is a ControlNet of another architecture than"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    values: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path
) -> None:
    if "name" in values:
        flow_controls.write(folder / "flux.safetensors", flow_controls.flux_net("latents"))
        values = {"name": str(folder / "flux.safetensors")}
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, replace(net(folder, "1"), **values))
