"""Components are shared by their content: a switch between models moves only what differs."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.scale import thinned

import safelight
from safelight.catalog.catalog import Catalog
from safelight.families.flux2.spec import FLUX2_KLEIN
from safelight.families.parts.qwen3 import Qwen3Config
from safelight.families.zimage.spec import ZIMAGE
from safelight.weights.manifest import ComponentManifest

if any(find_spec(f"diffusers.models.transformers.transformer_{name}") is None for name in ("z_image", "flux2")):
    pytest.skip("the installed diffusers lacks these models", allow_module_level=True)

from support import flux2, zimage

SEED = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Z-Image and FLUX.2 klein with the same Qwen3: in a folder, and in a file as ComfyUI has it."""
    place = tmp_path_factory.mktemp("shared")
    klein = flux2.write_folder(place / "klein", SEED, distilled=True)
    folder = zimage.write_folder(place / "z-image", SEED)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(klein / "text_encoder", folder / "text_encoder")
    files = zimage.write_files(place / "files", SEED)
    [weights] = (klein / "text_encoder").glob("*.safetensors")
    save_file(load_file(weights), files / "text_encoders/qwen_3_tiny.safetensors")
    return {"klein": klein, "folder": folder, "files": files}


def moved(engine: Any) -> int:
    return engine.memory()["transfers"]["nbytes"]


def ask(prompt: str, model: str) -> safelight.Request:
    return safelight.Request(prompt, model, seed=3, steps=2, width=64, height=64, precision="fp32")


def size(component: ComponentManifest) -> int:
    return sum(tensor.nbytes for tensor in component.tensors)


@pytest.mark.full
@pytest.mark.parametrize("form", thinned(["files", "folder"]))
def test_a_switch_moves_what_differs_and_not_one_byte_of_qwen3(
    form: str, root: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog.under(root)
    if form == "files":
        for part in ("text_encoders/qwen_3_tiny", "vae/ae_tiny"):
            catalog.adapters.add(models["files"] / f"{part}.safetensors")
        z_image = catalog.library.add(
            models["files"] / "diffusion_models/z_image_tiny.safetensors", "z", variant="turbo"
        )
    else:
        z_image = catalog.library.add(models["folder"], "z")
    klein = catalog.library.add(models["klein"], "k")
    encoder, other = (model.manifest.component("text_encoder") for model in (z_image, klein))
    assert encoder.digest == other.digest
    engine: Any = safelight.open_engine(root, device="simulated")
    pixels: dict[str, str] = {}
    sizes = {model.name: sum(map(size, model.manifest.components)) - size(encoder) for model in (z_image, klein)}
    for number, name in enumerate("zkzk"):
        before = moved(engine)
        image = next(engine.generate(ask(f"apple {number}", name)))
        pixels[f"{name}{number}"] = image.pixels_sha256
        weights = {0: sizes["z"] + size(encoder), 1: sizes["k"], 2: 0, 3: 0}[number]
        # Segments are padded.
        assert weights <= moved(engine) - before <= weights * 1.05 + 2_000_000, (
            number,
            weights,
            moved(engine) - before,
        )
    fresh: Any = safelight.open_engine(root, device="simulated")
    assert next(fresh.generate(ask("apple 3", "k"))).pixels_sha256 == pixels["k3"]


def text_encoder_bytes(engine: Any) -> tuple[int, int]:
    """Return the bytes of the text encoder in memory, and its bytes altogether."""
    usages = engine.resources.residency.usage_by_component()
    [usage] = [one for one in usages if one.component.startswith("text_encoder")]
    return usage.nbytes, usage.total


@pytest.mark.full
def test_klein_brings_only_the_layers_of_qwen3_that_it_reads(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So wide that a few layers fill a segment; a narrow Qwen3 has all layers in one.
    wide = Qwen3Config(zimage.VOCABULARY, 32, 8192, 36, 2, 1, 16)
    configs = flux2.configs()
    monkeypatch.setattr(flux2, "configs", lambda: {**configs, "text_encoder": wide})
    klein = flux2.write_folder(tmp_path / "klein", SEED, distilled=True)
    folder = zimage.write_folder(tmp_path / "z-image", SEED)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(klein / "text_encoder", folder / "text_encoder")
    library = Catalog.under(root).library
    k, z = library.add(klein, "k"), library.add(folder, "z")
    names = [tensor.name for tensor in k.manifest.component("text_encoder").tensors]
    unread = FLUX2_KLEIN.unread("text_encoder", names)
    assert {name.split(".")[1] for name in unread} == {str(number) for number in range(27, 35)}
    assert ZIMAGE.unread("text_encoder", names) == frozenset()

    engine: Any = safelight.open_engine(root)
    right = next(engine.generate(ask("apple", "k"))).pixels_sha256
    resident, total = text_encoder_bytes(engine)
    assert resident < 0.92 * total
    assert engine.loaded.resident() == [k.digest]
    next(engine.generate(ask("apple", "z")))
    assert text_encoder_bytes(engine) == (total, total)
    assert next(engine.generate(ask("apple", "k"))).pixels_sha256 == right
    assert engine.loaded.resident() == [k.digest, z.digest]
