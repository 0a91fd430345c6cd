"""Krea 2's files as people have them: folders, a transformer alone, text encoders and VAEs in files of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import load_file, save_file
from support import krea2, zimage
from support.scale import thinned, times

import safelight
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.krea2.spec import PREFIXES
from safelight.families.parts.qwen_vae import QWEN_VAE

SEED = 5
TRANSFORMER = "diffusion_models/krea2_tiny.safetensors"
ENCODER = "text_encoders/qwen3vl_tiny.safetensors"
VAE = "vae/qwen_image_vae.safetensors"


def pixels(root: Path, model: str) -> str:
    request = safelight.Request("a red apple", model, seed=3, steps=1, width=64, height=48, cfg=1.0)
    return next(safelight.open_engine(root).generate(request)).pixels_sha256


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, turbo: Path) -> str:
    """The pixels of the sharded diffusers folder."""
    assert len(list((turbo / "transformer").glob("*.safetensors"))) > 1
    return pixels(tmp_path_factory.mktemp("right"), str(turbo))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return krea2.write_files(tmp_path_factory.mktemp("files"), SEED)


def test_a_folder_as_comfyui_has_it_is_added(root: Path, files: Path, turbo: Path, right: str) -> None:
    catalog = Catalog.under(root)
    for file in (ENCODER, VAE):
        catalog.adapters.add(files / file)
    alone = catalog.library.add(files / TRANSFORMER, variant="turbo")
    assert alone.sources == {"text_encoder": "qwen3vl_tiny", "vae": "qwen_image_vae"}
    assert pixels(root, "krea2_tiny") == right
    whole = catalog.library.add(turbo, "whole")
    assert [part.digest for part in alone.manifest.components] == [part.digest for part in whole.manifest.components]


@pytest.mark.parametrize("comfy", thinned([False, True]))
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_identified(prefix: str, comfy: bool, tmp_path: Path, files: Path) -> None:
    net = {name.removeprefix("model.diffusion_model."): one for name, one in load_file(files / TRANSFORMER).items()}
    save_file({prefix + name: tensor for name, tensor in net.items()}, tmp_path / "net.safetensors")
    found = identify(tmp_path / "net.safetensors")
    assert (found.kind, found.base, found.variant) == ("checkpoint", "krea-2", None)
    assert found.layout is not None
    assert found.layout.missing == ("text_encoder", "vae")
    assert "fuses layers of the text encoder, alone" in found.rule
    if prefix == PREFIXES[0]:
        save_file(krea2.text_file(krea2.modules(SEED)["text_encoder"], comfy), tmp_path / "text.safetensors")
        assert "vision tower" in identify(tmp_path / "text.safetensors").rule


def test_diffusers_names_are_read_without_a_folder(root: Path, turbo: Path, files: Path, right: str) -> None:
    catalog = Catalog.under(root)
    save_file(krea2.text_file(krea2.modules(SEED)["text_encoder"], comfy=False), files / "whole.safetensors")
    for file in (files / "whole.safetensors", turbo / "vae/diffusion_pytorch_model.safetensors"):
        catalog.adapters.add(file)
    state = {
        f"net.{name}": one
        for file in (turbo / "transformer").glob("*.safetensors")
        for name, one in load_file(file).items()
    }
    save_file(state, files / "net.safetensors", {"modelspec.architecture": "Krea-2-Turbo"})
    assert catalog.library.add(files / "net.safetensors").variant == "turbo"
    assert pixels(root, "net") == right


def test_all_in_one_file(root: Path, tmp_path: Path, files: Path) -> None:
    """Tensors that no image needs are not read: the vision tower, the last layer, convolutions over frames."""
    whole: dict[str, torch.Tensor] = dict(load_file(files / TRANSFORMER))
    whole |= {f"text_encoders.qwen3vl_4b.transformer.{name}": one for name, one in load_file(files / ENCODER).items()}
    whole |= {f"vae.{name}": one for name, one in load_file(files / VAE).items()}
    save_file(whole, tmp_path / "all.safetensors")
    library = Catalog.under(root).library
    with pytest.raises(UnsupportedModelError, match="with --variant turbo or --variant raw"):
        library.add(tmp_path / "all.safetensors")
    model = library.add(tmp_path / "all.safetensors", variant="turbo")
    read = [tensor.name for component in model.manifest.components for tensor in component.tensors]
    assert not [name for name in read if "visual" in name or "time_conv" in name or name.startswith("layers.5.")]


def test_diffusers_converts_the_original_names_to_the_same_tensors() -> None:
    built = krea2.modules(SEED)
    net = built["transformer"].state_dict()
    converted = convert_krea2_transformer_checkpoint_to_diffusers(
        krea2.original_names("transformer", built["transformer"])
    )
    assert converted.keys() == net.keys()
    assert all(torch.equal(converted[name], net[name]) for name in net)


def test_diffusers_converts_the_names_of_the_vae_to_the_same_tensors() -> None:
    """The converter knows only the published number of layers, so only names are compared."""
    names = {row.sources[-1].name: torch.zeros(1) for row in QWEN_VAE.rows()}
    assert convert_wan_vae_to_diffusers(names).keys() == {row.name for row in QWEN_VAE.rows()}


def test_a_text_encoder_of_another_model_is_refused(root: Path, tmp_path: Path, files: Path) -> None:
    """Qwen3 has the shapes of Qwen3-VL's language model, and other weights."""
    catalog = Catalog.under(root)
    catalog.adapters.add(files / VAE)
    other = zimage.write_files(tmp_path / "other", SEED)
    assert catalog.adapters.add(other / "text_encoders/qwen_3_tiny.safetensors").kind == "text_encoder"
    with pytest.raises(
        UnsupportedModelError, match="has no text_encoder \\(qwen3-vl 2560x35\\), and none in the library"
    ):
        catalog.library.add(files / TRANSFORMER, variant="raw")
    catalog.adapters.add(files / ENCODER)
    catalog.adapters.remove("qwen_3_tiny")
    catalog.adapters.add(other / "vae/ae_tiny.safetensors")
    with pytest.raises(UnsupportedModelError, match="has no text_encoder \\(qwen3 2560x35\\), and none in the library"):
        catalog.library.add(other / "diffusion_models/z_image_tiny.safetensors", variant="turbo")


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        ("model_index.json", "text_encoder_select_layers", [1, 2], r"text_encoder_select_layers = \[1, 2\]"),
        ("scheduler/scheduler_config.json", "max_image_seq_len", 4096, "max_image_seq_len = 4096; krea-2 has 6400"),
        ("transformer/config.json", "rope_theta", 10.0, "rope_theta = 10.0"),
    ],
)
def test_other_settings_are_refused(file: str, key: str, value: object, says: str, tmp_path: Path, turbo: Path) -> None:
    path = Path(shutil.copytree(turbo, tmp_path / "other"))
    settings = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(UnsupportedModelError, match=says):
        identify(path)


def test_each_missing_tensor_and_each_wrong_shape_is_named(tmp_path: Path, files: Path) -> None:
    path = tmp_path / "broken.safetensors"
    for file, step in ((TRANSFORMER, times(9, 1)), (ENCODER, times(30, 5)), (VAE, times(30, 2))):
        whole = load_file(files / file)
        wanted = [name for name in sorted(whole) if "visual" not in name and "time_conv" not in name]
        for name in wanted[::step]:
            if name.endswith("model.norm.weight") or "layers.5." in name:
                continue
            save_file({other: tensor for other, tensor in whole.items() if other != name}, path)
            with pytest.raises((IncompleteModelError, UnsupportedModelError)) as caught:
                _read(path, file)
            assert name.removeprefix("model.diffusion_model.") in str(caught.value)
            assert "krea-2 checkpoint" in str(caught.value) or file != TRANSFORMER
            assert "not a complete Qwen3-VL text encoder" in str(caught.value) or file != ENCODER
            save_file({**whole, name: torch.zeros(3, 5, 2)}, path)
            with pytest.raises((IncompleteModelError, UnsupportedModelError)):
                _read(path, file)


def _read(path: Path, file: str) -> None:
    if file == TRANSFORMER:
        identify(path)
    else:
        Catalog.under(path.parent / "root").adapters.add(path)
