"""Qwen-Image's ControlNets: pixels equal those of diffusers' pipeline, bit for bit; misfits are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageMultiControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support import controls, flow_controls, memory, qwen_image
from support.checkpoints import random_module
from support.oracle import aligned
from support.scale import thinned

import safelight
from safelight.catalog.identify import identify
from safelight.errors import InputError, RequestError
from safelight.families.family_model import Call, ControlCall, family_model
from safelight.families.parts.sequences import pack
from safelight.families.qwen_image.transformer import QwenImageConfig
from safelight.families.registry import family
from safelight.request.adapters import Control
from safelight.workers.local_engine import LocalEngine

SEED = 5
SIZE = {"width": 64, "height": 48}
NEGATIVE = "a blurred picture of many green pears"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ControlNets and pictures."""
    made = tmp_path_factory.mktemp("qwen-image")
    qwen_image.write_folder(made / "model", SEED)
    for form in flow_controls.QWEN_NETS:
        flow_controls.write(made / f"{form}.safetensors", flow_controls.qwen_net(form))
    for name, seed in (("edges", 9), ("depth", 10)):
        path = controls.picture(made / f"{name}.png", seed)
        Image.open(path).resize((64, 48)).save(path)
    return made


@pytest.fixture(scope="module")
def pipe() -> Any:
    return qwen_image.pipeline(SEED)


def theirs(pipe: Any, net: Any, pictures: Any, scale: float = 1.0, **call: Any) -> bytes:
    other = diffusers.QwenImageControlNetPipeline(**pipe.components, controlnet=net)
    other.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    given = {"control_image": pictures, "controlnet_conditioning_scale": 1.0, "num_inference_steps": 3, **SIZE}
    generator = torch.Generator("cpu").manual_seed(11)
    return other("a red apple", generator=generator, true_cfg_scale=scale, **given | call).images[0].tobytes()


def by_diffusers(pipe: Any, folder: Path, form: str, **call: Any) -> bytes:
    return theirs(pipe, aligned(flow_controls.qwen_net(form)), Image.open(folder / "edges.png"), **call)


def ours(engine: LocalEngine, folder: Path, *asked: Control, **changes: Any) -> bytes:
    values = {"seed": 11, "steps": 3, "cfg": 1.0, **SIZE, **changes}
    request = safelight.Request("a red apple", str(folder / "model"), controls=asked, **values)
    return next(engine.generate(request)).pixels


def net(folder: Path, form: str, picture: str = "edges", **more: Any) -> Control:
    return Control(str(folder / f"{form}.safetensors"), str(folder / f"{picture}.png"), **more)


@pytest.mark.parametrize("form", ["fewer", "whole"])
def test_text_to_image(form: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    right = by_diffusers(pipe, folder, form, controlnet_conditioning_scale=0.8)
    assert ours(shared_engine, folder, net(folder, form, weight=0.8)) == right
    assert ours(shared_engine, folder) != right


def test_guidance(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """The ControlNet reads the prompt, and its output is added in the call with the negative prompt, too."""
    asked, guided = net(folder, "fewer"), {"cfg": 4.0, "negative": NEGATIVE}
    balanced = ours(shared_engine, folder, asked, **guided)
    assert balanced == by_diffusers(pipe, folder, "fewer", scale=4.0, negative_prompt=NEGATIVE)
    unbalanced = ours(shared_engine, folder, replace(asked, mode="unbalanced"), **guided)
    assert unbalanced not in (balanced, ours(shared_engine, folder, **guided))


def test_a_part_of_the_steps(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    made = ours(shared_engine, folder, net(folder, "whole", start=0.2, end=0.8))
    part = {"control_guidance_start": 0.2, "control_guidance_end": 0.8}
    assert made == by_diffusers(pipe, folder, "whole", **part)
    assert made != ours(shared_engine, folder, net(folder, "whole"))


def test_two_pictures(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    """diffusers takes several pictures for one ControlNet."""
    nets = QwenImageMultiControlNetModel([aligned(flow_controls.qwen_net("fewer"))])
    pictures = [Image.open(folder / f"{name}.png") for name in ("edges", "depth")]
    right = theirs(pipe, nets, pictures, controlnet_conditioning_scale=[1.0, 0.5])
    both = net(folder, "fewer"), net(folder, "fewer", "depth", weight=0.5)
    assert ours(shared_engine, folder, *both) == right


def test_what_diffusers_lacks_changes_the_picture(shared_engine: LocalEngine, folder: Path, picture: Path) -> None:
    """Image to image, and two ControlNets of different lengths."""
    start = {"image": str(picture), "strength": 0.7}
    one, other = net(folder, "fewer"), net(folder, "whole", "depth", weight=0.5)
    drawn = [ours(shared_engine, folder, *asked, **start) for asked in ((), (one,), (one, other), (other,))]
    assert len(set(drawn)) == 4
    # The latents of a ControlNet's picture are drawn before the noise, whatever its weight is.
    without = [ours(shared_engine, folder, replace(each, weight=0.0), **start) for each in (one, other)]
    assert without[0] == without[1] not in drawn


@torch.no_grad()
def test_each_output_belongs_to_a_run_of_blocks() -> None:
    """diffusers' transformer adds two outputs to five blocks: the first to three of them, the second to two."""
    config, model = qwen_image.configs()["transformer"], family_model(family("qwen-image"))
    assert isinstance(config, QwenImageConfig)
    chance = torch.Generator().manual_seed(1)
    denoiser: Any = random_module("qwen-image", replace(config, layers=5), chance)
    own: Any = flow_controls.qwen_net("whole")
    texts = {"hidden": torch.randn(1, 9, 32, generator=chance), "length": torch.tensor([9])}
    call = Call(torch.randn(1, 16, 6, 8, generator=chance), torch.tensor(500.0), texts)
    shown = torch.randn(1, 12, 64, generator=chance)
    inputs = {"hidden_states": pack(call.latents), "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 3, 4)]]}
    inputs |= {"encoder_hidden_states": texts["hidden"], "return_dict": False}
    right = denoiser(**inputs, controlnet_block_samples=own(**inputs, controlnet_cond=shown))[0]
    added = model.control(own, denoiser, call, ControlCall(shown))
    assert torch.equal(pack(model.predict(denoiser, replace(call, control=added))), right)


def test_streamed_through_the_least_memory_it_is_the_same(root: Path, folder: Path) -> None:
    transformer = memory.manifest(folder / "model").component("transformer")
    own = safelight.open_engine(root).catalog.adapters.find(str(folder / "fewer.safetensors")).component
    chance = torch.Generator().manual_seed(1)
    texts = {"hidden": torch.randn(1, 9, 32, generator=chance), "length": torch.tensor([9])}
    call = Call(torch.randn(1, 16, 6, 8, generator=chance), torch.tensor(500.0), texts)
    how = ControlCall(torch.randn(1, 12, 64, generator=chance))
    resident, streamed = (
        flow_controls.predicted("qwen-image", (transformer, own), call, how, streamed) for streamed in (False, True)
    )
    assert torch.equal(streamed, resident)
    assert not torch.equal(
        flow_controls.predicted("qwen-image", (transformer, own), call, replace(how, weight=0.5), True), resident
    )


@pytest.mark.parametrize("form", thinned(["fewer"], 0))
def test_bf16(form: str, tmp_path: Path, folder: Path) -> None:
    """The noise is drawn in fp32 for every dtype; diffusers draws it in bf16, so it is given the same noise.

    Both draw the latents of the ControlNet's picture first.
    """
    loaded = qwen_image.loaded(folder / "model", torch.bfloat16)
    chance = torch.Generator("cpu").manual_seed(11)
    torch.randn((1, 16, 1, 6, 8), generator=chance, dtype=torch.bfloat16)
    noise = torch.randn((1, 16, 6, 8), generator=chance).to(torch.bfloat16)
    own = aligned(flow_controls.qwen_net(form).to(torch.bfloat16))
    packed = loaded._pack_latents(noise, 1, 16, 6, 8)
    right = theirs(loaded, own, Image.open(folder / "edges.png"), 4.0, negative_prompt=NEGATIVE, latents=packed)
    engine = safelight.open_engine(tmp_path / "root")
    asked = net(folder, form)
    assert ours(engine, folder, asked, precision="bf16", cfg=4.0, negative=NEGATIVE) == right


@pytest.mark.parametrize("form", flow_controls.QWEN_NETS)
def test_it_is_recognised(form: str, folder: Path) -> None:
    found = identify(folder / f"{form}.safetensors")
    assert (found.kind, found.base) == ("controlnet", "qwen-image")


def test_a_missing_tensor_is_named(root: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "fewer.safetensors")
    del tensors["controlnet_blocks.0.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"Qwen-Image ControlNet.*controlnet_blocks\.0\.bias"):
        safelight.open_engine(root).catalog.adapters.add(tmp_path / "x.safetensors")


def test_a_blockwise_controlnet_is_named(root: Path, tmp_path: Path) -> None:
    names = ("img_in.weight", "controlnet_blocks.0.x_rms.weight", "controlnet_blocks.0.y_rms.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    assert identify(tmp_path / "x.safetensors").kind == "blockwise_controlnet"
    with pytest.raises(InputError, match="blockwise_controlnet"):
        safelight.open_engine(root).catalog.adapters.add(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mode": "more_control"}, "ControlNets for qwen-image have the mode balanced, unbalanced"),
        ({"union_type": "canny"}, "reads one type of pictures; leave union_type out"),
        ({"name": "mask"}, "also reads a mask: ControlNets for inpainting are not supported"),
        ({"name": "flux"}, "is a ControlNet of another architecture than"),
        ({"name": "deep"}, "has 3 blocks, but model .* has only 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    values: dict[str, Any], says: str, shared_engine: LocalEngine, folder: Path, tmp_path: Path
) -> None:
    if values.get("name") == "flux":
        flow_controls.write(folder / "flux.safetensors", flow_controls.flux_net("latents"))
    if values.get("name") == "deep":
        whole = load_file(folder / "whole.safetensors")
        third = {name.replace("blocks.1.", "blocks.2."): one.clone() for name, one in whole.items()}
        save_file(whole | third, folder / "deep.safetensors")
    if "name" in values:
        values = {"name": str(folder / f"{values['name']}.safetensors")}
    with pytest.raises(RequestError, match=says):
        ours(shared_engine, folder, replace(net(folder, "fewer"), **values))
