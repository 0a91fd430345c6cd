"""FLUX.1 Kontext and Fill: the pixels equal those of diffusers' pipelines, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext, pipeline_flux_kontext_inpaint
from PIL import Image
from support import flow_controls, flux
from support.pictures import soft_picture
from support.scale import thinned

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import RequestError
from safelight.families.flux import spec
from safelight.families.flux.model import MODEL
from safelight.families.references import Size
from safelight.request.adapters import Control
from safelight.request.results import Image as Made
from safelight.resolve.resolve import with_defaults
from safelight.workers.local_engine import LocalEngine

SEED = 5
PROMPT = "make the apple green"
SMALL: tuple[Size, ...] = ((64, 96), (64, 48), (112, 64))
"""Sizes for references in place of the published ones, which have a million pixels."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {variant: flux.write_folder(root / variant, SEED, variant) for variant in ("kontext", "fill")}


@pytest.fixture(scope="module")
def kontext() -> Any:
    return flux.pipeline(SEED, "kontext")


@pytest.fixture(scope="module")
def fill() -> Any:
    return flux.pipeline(SEED, "fill")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return soft_picture(tmp_path_factory.mktemp("pictures") / "picture.png", (64, 48), 2)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return soft_picture(tmp_path / "wide.png", (130, 79), 3)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_REFERENCE_SIZES", SMALL)
    for module in (pipeline_flux_kontext, pipeline_flux_kontext_inpaint):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", SMALL)


def theirs(pipe: Any, **call: Any) -> Any:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    values = {"prompt": PROMPT, "width": 64, "height": 48, "num_inference_steps": 2, "guidance_scale": 2.5, **call}
    return pipe(**values, generator=torch.Generator("cpu").manual_seed(11)).images[0]


def ours(engine: LocalEngine, path: Path, **changes: Any) -> Made:
    values = {"prompt": PROMPT, "width": 64, "height": 48, "steps": 2, "guidance": 2.5, "seed": 11, **changes}
    return next(engine.generate(safelight.Request(model=str(path), **values)))


def refer(*paths: Path) -> dict[str, Any]:
    return {"references": tuple(map(str, paths))}


@pytest.mark.usefixtures("small_sizes")
def test_kontext_with_a_reference(
    shared_engine: LocalEngine, folders: dict[str, Path], kontext: Any, wide: Path
) -> None:
    made = ours(shared_engine, folders["kontext"], **refer(wide))
    right = theirs(kontext, image=Image.open(wide), max_area=64 * 48)
    assert made.pixels == right.tobytes()
    assert list(made.warnings) == ["references: the model sees picture 1 at 112x64, not 130x79"]
    own_size = ours(shared_engine, folders["kontext"], width=None, height=None, **refer(wide))
    assert (own_size.width, own_size.height) == (112, 64)


def test_kontext_without_a_reference(shared_engine: LocalEngine, folders: dict[str, Path], kontext: Any) -> None:
    assert ours(shared_engine, folders["kontext"]).pixels == theirs(kontext, max_area=64 * 48).tobytes()


@pytest.mark.full
def test_kontext_in_its_published_sizes(
    shared_engine: LocalEngine, folders: dict[str, Path], kontext: Any, wide: Path
) -> None:
    made = ours(shared_engine, folders["kontext"], **refer(wide))
    assert made.pixels == theirs(kontext, image=Image.open(wide), max_area=64 * 48).tobytes()
    assert list(made.warnings) == ["references: the model sees picture 1 at 1456x720, not 130x79"]


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize(("strength", "masked"), thinned([(0.6, True), (1.0, False)], unpack=True))
def test_kontext_with_an_image_a_mask_and_a_reference(
    strength: float,
    masked: bool,
    shared_engine: LocalEngine,
    folders: dict[str, Path],
    kontext: Any,
    picture: Path,
    wide: Path,
    tmp_path: Path,
) -> None:
    mask = _mask(tmp_path / "mask.png", masked)
    inpaint: Any = diffusers.FluxKontextInpaintPipeline(**kontext.components)
    call = {"mask_image": Image.open(mask), "strength": strength, "num_inference_steps": 4, "max_area": 64 * 48}
    found = theirs(inpaint, image=Image.open(picture), image_reference=Image.open(wide), **call)
    changes = {"image": str(picture), "strength": strength, "steps": 4}
    changes |= {"mask": str(mask), "mask_blur": 0} if masked else {}
    made = ours(shared_engine, folders["kontext"], **changes, **refer(wide))
    assert made.pixels == _pasted(found, picture, mask)


def _mask(path: Path, masked: bool = True) -> Path:
    made = Image.new("L", (64, 48), 0 if masked else 255)
    # Not along the edges of latents.
    made.paste(255, (13, 6, 47, 41))
    made.save(path)
    return path


def _pasted(drawn: Image.Image, picture: Path, mask: Path) -> bytes:
    outside = np.asarray(Image.open(mask))[..., None] < 128
    return np.where(outside, np.asarray(Image.open(picture)), np.asarray(drawn)).tobytes()


def test_sizes_of_references_are_those_of_diffusers() -> None:
    assert list(spec._REFERENCE_SIZES) == list(pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS)
    processor = VaeImageProcessor(vae_scale_factor=16)
    for size in ((64, 48), (16, 500), (1031, 997), (333, 444), (1920, 1080)):
        picture = Image.new("RGB", size)
        high, wide = processor.get_default_height_width(picture)
        right = min((abs(wide / high - w / h), w, h) for w, h in spec._REFERENCE_SIZES)[1:]
        assert spec.reference_size(size) == right
        assert MODEL.prepare_reference(picture, right).size == right


@pytest.mark.parametrize("strength", thinned([1.0, 0.6]))
def test_fill(
    strength: float, shared_engine: LocalEngine, folders: dict[str, Path], fill: Any, picture: Path, tmp_path: Path
) -> None:
    mask = _mask(tmp_path / "mask.png")
    call = {"image": Image.open(picture), "mask_image": Image.open(mask), "strength": strength, "guidance_scale": 30.0}
    right = _pasted(theirs(fill, **call, num_inference_steps=4), picture, mask)
    changes = {"image": str(picture), "mask": str(mask), "mask_blur": 0, "strength": strength, "guidance": 30.0}
    made = ours(shared_engine, folders["fill"], **changes, steps=4)
    assert made.pixels == right


def test_fill_outpaints(shared_engine: LocalEngine, folders: dict[str, Path], fill: Any, picture: Path) -> None:
    """The new part is filled with the mirrored picture."""
    grown = np.pad(np.asarray(Image.open(picture)), ((0, 0), (0, 16), (0, 0)), mode="symmetric")
    new = np.pad(np.zeros((48, 64), np.uint8), ((0, 0), (0, 16)), constant_values=255)
    drawn = theirs(fill, image=Image.fromarray(grown), mask_image=Image.fromarray(new), strength=1.0, width=80)
    changes = {"image": str(picture), "outpaint": (0, 0, 16, 0), "mask_blur": 0, "strength": 1.0, "width": None}
    made = ours(shared_engine, folders["fill"], **changes)
    assert made.pixels == np.where(new[..., None] < 128, grown, np.asarray(drawn)).tobytes()


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.full
@pytest.mark.parametrize("variant", ["fill", "kontext"])
def test_bf16(variant: str, folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    """The noise of Safelight is drawn in fp32 where an image starts from noise, so Kontext's pipeline is given it."""
    pipe = flux.loaded(folders[variant], torch.bfloat16, variant)
    mask = _mask(tmp_path / "mask.png")
    engine = safelight.open_engine(tmp_path / "root")
    call = {"image": Image.open(picture), "mask_image": Image.open(mask), "strength": 1.0}
    changes: dict[str, Any] = {"image": str(picture), "mask": str(mask), "mask_blur": 0, "strength": 1.0}
    if variant == "kontext":
        noise = torch.randn(1, 16, 6, 8, generator=torch.Generator("cpu").manual_seed(11)).bfloat16()
        packed = pipe._pack_latents(noise, 1, 16, 6, 8)
        call = {"image": Image.open(picture), "latents": packed, "max_area": 64 * 48}
        changes = refer(picture)
    made = ours(engine, folders[variant], precision="bf16", **changes).pixels
    found = theirs(pipe, **call)
    assert made == (_pasted(found, picture, mask) if variant == "fill" else found.tobytes())


@pytest.mark.parametrize(("variant", "wanted"), thinned([("kontext", (28, 2.5)), ("fill", (50, 30.0))], unpack=True))
def test_variants_and_defaults(
    variant: str, wanted: tuple[int, float], root: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    library = Catalog.under(root).library
    model = library.find(str(folders[variant]))
    found = with_defaults(safelight.Request("x", "y"), model)
    assert (model.variant, found.steps, found.guidance) == (variant, *wanted)
    single = flux.write_single(tmp_path / "single.safetensors", SEED, variant)
    assert identify(single).variant == (None if variant == "kontext" else variant)
    added = library.add(single, variant=variant)
    assert (added.variant, added.digest) == (variant, model.digest)
    export.to_diffusers(added, tmp_path / "exported")
    name = json.loads((tmp_path / "exported/model_index.json").read_text())["_class_name"]
    assert (name, identify(tmp_path / "exported").variant) == (flux.PIPELINES[variant].__name__, variant)


def test_what_they_cannot_do_is_refused(shared_engine: LocalEngine, folders: dict[str, Path], picture: Path) -> None:
    for variant, changes, message in (
        ("fill", {}, "is a checkpoint for fill: it needs an image and a mask"),
        ("fill", {"image": str(picture)}, "is a checkpoint for fill: it needs an image and a mask"),
        ("fill", refer(picture), "asks for reference images, which fill .* does not have"),
        ("kontext", refer(picture, picture), r"references=2: kontext \(flux, kontext\) takes 0 to 1 pictures"),
    ):
        with pytest.raises(RequestError, match=message):
            ours(shared_engine, folders[variant], **changes)


@pytest.mark.usefixtures("small_sizes")
def test_a_controlnet_beside_a_reference(
    shared_engine: LocalEngine, folders: dict[str, Path], picture: Path, wide: Path, tmp_path: Path
) -> None:
    """It does not see the reference image: with the weight 0 it changes nothing. diffusers cannot do both at once."""
    path = flow_controls.write(tmp_path / "x.safetensors", flow_controls.flux_net("latents"))
    net = Control(str(path), str(picture))
    drawn = [
        ours(shared_engine, folders["kontext"], controls=some, **seen).pixels
        for seen in ({}, refer(wide))
        for some in ((), (net,), (replace(net, weight=0.0),))
    ]
    assert (drawn[0], drawn[3]) == (drawn[2], drawn[5])
    assert len(set(drawn)) == 4
    with pytest.raises(RequestError, match="reads tokens of width 64, but 384 in"):
        ours(shared_engine, folders["fill"], image=str(picture), mask=str(picture), controls=(net,))
