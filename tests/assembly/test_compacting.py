"""``models compact``: a quantised file of a model, which Safelight and other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from support.families import TinyFamily, drawn, tiny_families
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.assembly import compacting
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.cli.main import app
from safelight.errors import InputError
from safelight.families.registry import families

SEED = 5
STARTER = "starter-noto"

if not {"flux", "z-image"} <= set(tiny_families()):
    pytest.skip("the installed libraries lack some of these models", allow_module_level=True)


def run(root: Path, *arguments: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as other programs read them."""
    if path.suffix == ".gguf":
        found = {
            one.name: torch.tensor(dequantize(one.data, one.tensor_type)).reshape(*map(int, one.shape[::-1]))
            for one in GGUFReader(path).tensors
        }
        assert load_gguf_checkpoint(str(path)).keys() == found.keys()
        return found
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = {name.removesuffix("_scale"): one for name, one in stored.items() if name.endswith("weight_scale")}
    kept = {name: one for name, one in stored.items() if not name.endswith(("weight_scale", "comfy_quant"))}
    return {name: one.float() * scales.get(name, 1.0) for name, one in kept.items()}


def add(root: Path, tiny: TinyFamily, place: Path) -> Any:
    return Catalog.under(root).library.add(tiny.write_folder(place / "folder", SEED), "whole", variant=tiny.variant)


@pytest.mark.parametrize("form", thinned(compacting.FORMS, 2))
@pytest.mark.parametrize("label", thinned(["flux", "z-image", *(set(tiny_families()) - {"flux", "z-image"})], 1))
def test_the_pixels_are_those_of_the_numbers_that_other_programs_read(
    label: str, form: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with the numbers that the package gguf, or safetensors, finds draws the same pixels."""
    from safetensors.torch import save_file

    tiny = tiny_families()[label]
    tiny.make_references_small(monkeypatch)
    model = add(root, tiny, tmp_path)
    library = Catalog.under(root).library
    written = compacting.write(model, form, compacting.path_of(model, form, None))
    assert written.path == tmp_path / f"whole-{form}.{'safetensors' if form == 'fp8' else 'gguf'}"
    assert written.nbytes == written.path.stat().st_size
    assert 0 < written.error < 0.15
    compact = compacting.add(library, model, written)
    assert {role: source for role, source in compact.sources.items() if source != "whole"} == {}
    plain = tmp_path / "plain.safetensors"
    save_file({name: one.contiguous() for name, one in dequantised(written.path).items()}, plain)
    wanted = library.add(plain, variant=tiny.variant)
    engine = safelight.open_engine(root)
    pixels = {one.name: drawn(engine, tiny.ask(one.name)) for one in (model, compact, wanted)}
    assert pixels[compact.name] == pixels["plain"] != pixels["whole"]


@pytest.mark.parametrize("form", thinned(["fp8", "q8_0"]))
def test_a_whole_checkpoint_of_stable_diffusion(form: str, root: Path, tmp_path: Path) -> None:
    found = run(root, "models", "compact", STARTER, "--form", form, "--out", str(tmp_path / "small"), "--json")
    about = json.loads(found.stdout)
    assert about["quantised"] > 50
    assert about["difference"].startswith("at most ")
    assert about["made_from"] == Catalog.under(root).library.get(STARTER).digest
    assert f"made by Safelight from {about['made_from'][:10]}" in about["rule"]
    before = Catalog.under(root).library.get(STARTER)
    after = Catalog.under(root).library.get("small")
    same = [one.digest for one in after.manifest.components if one.role != "unet"]
    assert same == [one.digest for one in before.manifest.components if one.role != "unet"]
    assert dequantised(tmp_path / "small").keys() >= {"model.diffusion_model.input_blocks.0.0.weight"}


@pytest.mark.full
def test_what_was_asked_for_is_said(root: Path, tmp_path: Path) -> None:
    said = run(root, "models", "compact", STARTER, "--form", "q4_0", "--out", str(tmp_path / "a.gguf")).output
    assert "tensors as q4_0" in said
    assert "error of the weights: " in said
    assert "difference of a small image: at most " in said
    assert f"added a: sd1, q4_0, made from {STARTER}" in said
    shown = run(root, "models", "show", "a", "--json").output
    assert json.loads(shown)["dtype"] == "q4_0"


def test_what_cannot_be_quantised_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("")
    library = Catalog.under(root).library
    with pytest.raises(InputError, match="already exists"):
        compacting.write(library.get(STARTER), "q8_0", taken)
    file = compacting.write(library.get(STARTER), "q8_0", tmp_path / "small.gguf").path
    small = library.add(file)
    with pytest.raises(InputError, match=r"small \(sd1\) cannot be quantised: tensor .* is Q8_0 already"):
        compacting.write(small, "q4_0", tmp_path / "smaller.gguf")
    found = run(root, "models", "compact", STARTER, "--form", "q3_k", code=2)
    assert "must be one of q8_0, q5_0, q4_0, fp8" in found.output


def test_an_error_leaves_no_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Catalog.under(root).library.get(STARTER)

    def stop(*_: object) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compacting, "quantise_blocks", stop)
    with pytest.raises(safelight.errors.StorageError):
        compacting.write(model, "q8_0", tmp_path / "out" / "small.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_names_are_known_to_comfyui_gguf() -> None:
    known = {"flux", "sd1", "sdxl", "cosmos", "lumina2", "qwen_image", "krea2"}
    assert {family.gguf_architecture for family in families().values()} - {""} == known


def test_a_quantised_file_says_what_it_is(root: Path, tmp_path: Path) -> None:
    model = Catalog.under(root).library.get(STARTER)
    compacting.write(model, "q5_0", tmp_path / "a.gguf")
    assert identify(tmp_path / "a.gguf").dtype == "q5_0"
