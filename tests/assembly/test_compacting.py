"""``models compact``: a quantised file of a model, which Safelight and other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.families import TinyFamily, drawn, tiny_families
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.assembly import compacting
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.catalog.library import Library
from safelight.cli.main import app
from safelight.errors import InputError, StorageError
from safelight.families.registry import families
from safelight.files.blocks import COMPACT_FORMS
from safelight.weights import quantised_file

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


@pytest.mark.parametrize("form", thinned(COMPACT_FORMS, 2))
@pytest.mark.parametrize("label", thinned(sorted(tiny_families(), key="flux".__ne__), 1))
def test_the_pixels_are_those_of_the_numbers_that_other_programs_read(
    label: str, form: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with the numbers that the package gguf, or safetensors, finds draws the same pixels."""
    tiny = tiny_families()[label]
    tiny.make_references_small(monkeypatch)
    model = add(root, tiny, tmp_path)
    library = Catalog.under(root).library
    written, compact = compacting.make(library, model, form)
    assert written.path == tmp_path / f"whole-{form}.{'safetensors' if form == 'fp8' else 'gguf'}"
    assert written.nbytes == written.path.stat().st_size
    assert 0 < written.error < 0.15
    digests = {one.role: one.digest for one in model.manifest.components}
    others = {one.role for one in compact.manifest.components if one.digest == digests[one.role]}
    assert others == set(tiny.roles) - {tiny.family.denoiser}
    assert compact.variant == model.variant
    assert model.variant_from_user or not compact.variant_from_user
    plain = tmp_path / "plain.safetensors"
    save_file({name: one.contiguous() for name, one in dequantised(written.path).items()}, plain)
    parts = {role: digest for role, digest in digests.items() if role in compact.sources}
    wanted = library.add(plain, variant=tiny.variant, wanted=parts)
    engine = safelight.open_engine(root)
    pixels = {one.name: drawn(engine, tiny.ask(one.name)) for one in (model, compact, wanted)}
    assert pixels[compact.name] == pixels["plain"] != pixels["whole"]


def test_diffusers_computes_with_the_file_of_a_model_in_bf16(root: Path, tmp_path: Path) -> None:
    """diffusers does not read BF16 in GGUF files; what is not quantised is F32 there."""
    tiny = tiny_families()["qwen-image"]
    folder = tiny.write_folder(tmp_path / "folder", SEED)
    [path] = (folder / "transformer").glob("*.safetensors")
    save_file({name: one.bfloat16() for name, one in load_file(path).items()}, path, {"format": "pt"})
    library = Catalog.under(root).library
    model = library.add(folder, "whole", variant=tiny.variant)
    written, _ = compacting.make(library, model, "q8_0")
    kind: Any = diffusers.QwenImageTransformer2DModel
    quantised = kind.from_single_file(
        str(written.path),
        config=str(folder),
        subfolder="transformer",
        torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    plain = kind.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(1, 16, plain.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, plain.config.joint_attention_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }
    with torch.no_grad():
        one, other = quantised(**call)[0], plain(**call)[0]
    assert 0 < (one - other).norm() / other.norm() < 0.03


@pytest.mark.parametrize("form", thinned(["fp8", "q8_0"]))
def test_a_whole_checkpoint_of_stable_diffusion(form: str, root: Path, tmp_path: Path) -> None:
    path = tmp_path / f"small.{'safetensors' if form == 'fp8' else 'gguf'}"
    found = run(root, "models", "compact", STARTER, "--form", form, "--out", str(path), "--json")
    about = json.loads(found.stdout)
    assert about["quantised"] > 50
    assert 0 < about["error"] < 0.05
    assert about["difference"].startswith("at most ")
    assert about["made_from"] == Catalog.under(root).library.get(STARTER).digest
    assert f"made by Safelight from {about['made_from'][:10]}" in about["rule"]
    before = Catalog.under(root).library.get(STARTER)
    after = Catalog.under(root).library.get("small")
    same = [one.digest for one in after.manifest.components if one.role != "unet"]
    assert same == [one.digest for one in before.manifest.components if one.role != "unet"]
    assert dequantised(path).keys() >= {"model.diffusion_model.input_blocks.0.0.weight"}


@pytest.mark.parametrize("form", thinned(["q8_0", "fp8"]))
@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_the_file_says_all_that_the_model_is(base: str, form: str, root: Path, tmp_path: Path) -> None:
    """The prediction type, the zero signal-to-noise ratio, and layers that are only counted."""
    extra = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)} if base != "sd2" else {}
    checkpoints.write_single(tmp_path / "whole.safetensors", base, extra=extra)
    library = Catalog.under(root).library
    model = library.add(tmp_path / "whole.safetensors")
    _, compact = compacting.make(library, model, form)
    fields = ("base", "variant", "prediction_type", "zero_terminal_snr", "resolution", "prediction_type_from_user")
    assert {name: getattr(compact, name) for name in fields} == {name: getattr(model, name) for name in fields}
    others = [role for role in model.roles if role != model.family.denoiser]
    assert [compact.manifest.component(role).digest for role in others] == [
        model.manifest.component(role).digest for role in others
    ]


def test_the_parts_stay_those_of_the_model(root: Path, tmp_path: Path) -> None:
    """Another text encoder and VAE would fit, too, and their files would be taken first."""
    tiny, catalog = tiny_families()["z-image"], Catalog.under(root)
    model = add(root, tiny, tmp_path)
    for role, file in tiny.write_files(tmp_path / "others", SEED + 1).items():
        if role != tiny.family.denoiser:
            catalog.adapters.add(file)
    _, compact = compacting.make(catalog.library, model, "q8_0")
    assert compact.sources == {"text_encoder": "whole", "vae": "whole"}


def test_a_starter_of_a_family_with_parts_becomes_one_file(root: Path, tmp_path: Path) -> None:
    library = Catalog.under(root).library
    _, compact = compacting.make(library, library.get("starter-flux"), "q4_0", tmp_path / "flux.gguf", "mine")
    assert (compact.name, compact.sources, compact.dtype) == ("mine", {}, "q4_0")


@pytest.mark.full
def test_what_was_asked_for_is_said(root: Path, tmp_path: Path) -> None:
    said = run(root, "models", "compact", STARTER, "--form", "q4_0", "--out", str(tmp_path / "a.gguf")).output
    assert "tensors as q4_0" in said
    assert "error of the weights: " in said
    assert "difference of a small image: at most " in said
    assert f"added a: sd1, q4_0, made from {STARTER}" in said
    shown = run(root, "models", "show", "a", "--json").output
    assert json.loads(shown)["dtype"] == "q4_0"


def test_an_image_that_cannot_be_drawn_is_said(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise InputError("there is no memory for it")

    monkeypatch.setattr(compacting, "measure", fail)
    found = run(root, "models", "compact", STARTER, "--form", "q8_0", "--out", str(tmp_path / "a.gguf"), "--json")
    assert json.loads(found.stdout)["difference"] is None
    assert "its images are not compared: there is no memory for it" in found.stderr


def test_what_cannot_be_quantised_is_refused_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("")
    library = Catalog.under(root).library
    starter = library.get(STARTER)
    with pytest.raises(InputError, match="already exists"):
        compacting.make(library, starter, "q8_0", taken)
    _, small = compacting.make(library, starter, "q8_0", tmp_path / "small.gguf")
    with pytest.raises(InputError, match=r"small \(sd1\) cannot be quantised: unet\..* is Q8_0 already"):
        compacting.make(library, small, "q4_0", tmp_path / "smaller.gguf")
    monkeypatch.setattr(compacting, "write", lambda *_: pytest.fail("the file was written for nothing"))
    with pytest.raises(InputError, match="the name 'small' is taken"):
        compacting.make(library, starter, "q4_0", tmp_path / "other.gguf", "small")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["small.gguf", "taken.gguf"]
    found = run(root, "models", "compact", STARTER, "--form", "q3_k", code=2)
    assert "must be one of q8_0, q5_0, q4_0, fp8" in found.output


def test_a_file_that_another_program_made_meanwhile_stays(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"

    def make_another(*_: object) -> None:
        path.write_text("mine")

    model = Catalog.under(root).library.get(STARTER)
    with pytest.raises(InputError, match="was made by another program meanwhile"):
        compacting.write(model, "q8_0", path, make_another)
    assert path.read_text() == "mine"


def test_an_error_leaves_no_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Catalog.under(root).library

    def stop(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(quantised_file, "quantise_blocks", stop)
        with pytest.raises(StorageError):
            compacting.make(library, library.get(STARTER), "q8_0", tmp_path / "out" / "small.gguf")
    monkeypatch.setattr(Library, "add", stop)
    with pytest.raises(OSError, match="No space"):
        compacting.make(library, library.get(STARTER), "q8_0", tmp_path / "out" / "small.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_names_are_known_to_comfyui_gguf() -> None:
    known = {"flux", "sd1", "sdxl", "cosmos", "lumina2", "qwen_image", "krea2"}
    assert {family.gguf_architecture for family in families().values()} - {""} == known


def test_a_quantised_file_says_what_it_is(root: Path, tmp_path: Path) -> None:
    model = Catalog.under(root).library.get(STARTER)
    compacting.write(model, "q5_0", tmp_path / "a.gguf")
    assert identify(tmp_path / "a.gguf").dtype == "q5_0"
