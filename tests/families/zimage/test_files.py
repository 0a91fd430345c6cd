"""Z-Image's files as people have them: folders, a transformer alone, text encoders and VAEs in files of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from support import zimage
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.cli.main import app
from safelight.errors import IncompleteModelError, ModelNotFoundError, UnsupportedModelError
from safelight.request.adapters import Purpose

SEED = 5
TRANSFORMER = "diffusion_models/z_image_tiny.safetensors"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")


def pixels(root: Path, model: str) -> str:
    request = safelight.Request("a red apple", model, seed=3, steps=2, width=64, height=48)
    return next(safelight.open_engine(root).generate(request)).pixels_sha256


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pixels of the diffusers folder."""
    place = tmp_path_factory.mktemp("right")
    return pixels(place / "root", str(zimage.write_folder(place / "tiny", SEED)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage.write_files(tmp_path_factory.mktemp("files"), SEED)


def run(root: Path, *arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert found.exit_code == code, (found.output, found.exception)
    return found.output


def test_a_folder_as_comfyui_has_it_is_added_by_one_command(root: Path, files: Path, right: str) -> None:
    said = run(root, "models", "add", str(files), "--variant", "turbo")
    assert "added qwen_3_tiny: text_encoder, fp32" in said
    assert "added ae_tiny: vae, fp32" in said
    assert "added z_image_tiny: z-image, fp32, flow, draws 1024x1024\n  text_encoder: from qwen_3_tiny, " in said
    assert "\n  vae: from ae_tiny, " in said
    assert pixels(root, "z_image_tiny") == right


@pytest.mark.parametrize("prefix", thinned(["", "model.", "language_model.", "model.language_model."], 2))
def test_every_prefix_of_a_text_encoder_is_identified(prefix: str, tmp_path: Path) -> None:
    folder = zimage.write_files(tmp_path, SEED, text_prefix=prefix)
    assert identify(folder / "text_encoders/qwen_3_tiny.safetensors").kind == "text_encoder"


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    module = zimage.modules(SEED)["transformer"]
    converted = convert_z_image_transformer_checkpoint_to_diffusers(zimage.original_names(module))
    state = module.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_what_is_missing_is_named(root: Path, files: Path) -> None:
    said = run(root, "models", "add", str(files / TRANSFORMER), "--variant", "turbo", code=2)
    assert "has no text_encoder (qwen3 2560x35) and no vae (vae 128-256-512-512x2), and none in the library" in said
    said = run(root, "models", "add", str(files / TRANSFORMER), code=2)
    assert (
        "is z-image, and nothing in it says which variant: use `safelight models add` with --variant turbo or" in said
    )
    said = run(root, "models", "add", str(files / TRANSFORMER), "--variant", "ultra", code=2)
    assert "whose variants are turbo, base; not ultra" in said


@pytest.mark.full
def test_a_part_is_chosen_and_changed(root: Path, files: Path, tmp_path: Path, right: str) -> None:
    other = zimage.write_files(tmp_path / "other", SEED + 1)
    (other / "vae/ae_tiny.safetensors").rename(other / "vae/zz_other.safetensors")
    run(root, "models", "add", str(files), "--variant", "turbo")
    run(root, "adapters", "add", str(other / "vae/zz_other.safetensors"))
    said = run(root, "models", "set", "z_image_tiny", "--vae", "zz_other")
    assert "vae: from zz_other" in said
    assert "(these fit, too: ae_tiny)" in said
    assert pixels(root, "z_image_tiny") != right
    run(root, "models", "verify", "z_image_tiny")
    shown = json.loads(run(root, "models", "show", "z_image_tiny", "--json"))
    assert shown["sources"] == {"text_encoder": "qwen_3_tiny", "vae": "zz_other"}
    run(root, "models", "set", "z_image_tiny", "--vae", "ae_tiny")
    assert pixels(root, "z_image_tiny") == right
    with pytest.raises(ModelNotFoundError, match="no VAE named 'nothing'"):
        Catalog.under(root).library.set_choices("z_image_tiny", parts=[(Purpose.VAE, "nothing")])


def test_a_part_that_does_not_fit_is_refused(root: Path, files: Path, tmp_path: Path, tiny: Path) -> None:
    catalog = Catalog.under(root)
    catalog.library.add(tiny / "a.safetensors", "sd")
    catalog.adapters.add(files / "text_encoders/qwen_3_tiny.safetensors")
    with pytest.raises(UnsupportedModelError, match="has latents of 16 channels, its VAE of 4"):
        catalog.library.add(files / TRANSFORMER, variant="turbo", parts=[(Purpose.VAE, "sd")])
    with pytest.raises(UnsupportedModelError, match="is a text_encoder \\(qwen3\\), which has no VAE for z-image"):
        catalog.library.add(files / TRANSFORMER, variant="turbo", parts=[(Purpose.VAE, "qwen_3_tiny")])
    with pytest.raises(ModelNotFoundError):
        catalog.library.add(files / TRANSFORMER, variant="turbo", parts=[(Purpose.VAE, "nothing")])
    with pytest.raises(UnsupportedModelError, match="is a sd1 model, which has no text encoder for z-image"):
        catalog.library.add(files / TRANSFORMER, variant="turbo", parts=[(Purpose.TEXT_ENCODER, "sd")])


def test_each_missing_tensor_and_each_wrong_shape_is_named(tmp_path: Path, files: Path) -> None:
    whole = load_file(files / TRANSFORMER)
    path = tmp_path / "broken.safetensors"
    for name in sorted(whole)[::7]:
        if name.endswith("cap_pad_token"):
            continue
        save_file({other: tensor for other, tensor in whole.items() if other != name}, path)
        with pytest.raises((IncompleteModelError, UnsupportedModelError)) as caught:
            identify(path)
        assert name.removeprefix("model.diffusion_model.") in str(caught.value)
        save_file({**whole, name: torch.zeros(3, 5, 2)}, path)
        with pytest.raises((IncompleteModelError, UnsupportedModelError)):
            identify(path)


def test_a_component_that_replaces_the_files_own_stays_when_the_model_is_verified(
    root: Path, tmp_path: Path, files: Path
) -> None:
    other = zimage.write_files(tmp_path / "other", SEED + 1)
    catalog = Catalog.under(root)
    catalog.library.add(zimage.write_folder(tmp_path / "folder", SEED), "m")
    vae = catalog.adapters.add(other / "vae/ae_tiny.safetensors", "other-vae")
    changed = catalog.library.set_choices("m", parts=[(Purpose.VAE, "other-vae")])
    assert changed.manifest.component("vae").digest == vae.component.digest
    assert catalog.library.verify("m").digest == changed.digest
    assert catalog.library.set_choices("m", variant="base").sources == {"vae": "other-vae"}


def test_a_pickled_transformer_keeps_the_components_of_other_files(root: Path, tmp_path: Path, files: Path) -> None:
    catalog = Catalog.under(root)
    for part in ("text_encoders/qwen_3_tiny", "vae/ae_tiny"):
        catalog.adapters.add(files / f"{part}.safetensors")
    torch.save(load_file(files / TRANSFORMER), tmp_path / "net.ckpt")
    model = catalog.library.add(tmp_path / "net.ckpt", variant="turbo")
    assert catalog.library.verify("net").digest == model.digest


def test_a_folder_with_another_shift_asks_for_its_variant(root: Path, tmp_path: Path) -> None:
    path = zimage.write_folder(tmp_path / "folder", SEED)
    (path / "scheduler/scheduler_config.json").write_text('{"shift": 4.5}')
    library = Catalog.under(root).library
    with pytest.raises(UnsupportedModelError, match="nothing in it says which variant"):
        library.add(path)
    assert library.add(path, variant="base").variant == "base"
