"""FLUX.1's files as people have them: one file with all, and a file for each component."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from support import flux
from support.checkpoints import random_module
from support.oracle import aligned
from support.scale import thinned

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.identify import identify
from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.flux.transformer import FluxConfig, infer
from safelight.request.adapters import Lora
from safelight.weights import manifest as manifests

SEED = 5


def pixels(root: Path, model: str) -> str:
    request = safelight.Request("a red apple", model, seed=3, steps=2, width=64, height=48)
    return next(safelight.open_engine(root).generate(request)).pixels_sha256


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pixels of the diffusers folders."""
    place = tmp_path_factory.mktemp("right")
    return {
        variant: pixels(place / "root", str(flux.write_folder(place / variant, SEED, variant)))
        for variant in ("dev", "schnell")
    }


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_a_file_in_the_original_names_draws_what_the_folder_draws(
    variant: str, root: Path, tmp_path: Path, right: dict[str, str]
) -> None:
    path = flux.write_single(tmp_path / "all.safetensors", SEED, variant)
    found = identify(path)
    # Krea and Kontext have the same tensors as dev.
    assert (found.kind, found.base, found.variant) == ("checkpoint", "flux", None if variant == "dev" else variant)
    assert pixels(root, Catalog.under(root).library.add(path, variant=variant).name) == right[variant]


def test_components_have_one_digest_whatever_file_has_them(root: Path, tmp_path: Path) -> None:
    """Swapped halves and slices of fused tensors are hashed as the module has them."""
    catalog = Catalog.under(root)
    folder = catalog.library.add(flux.write_folder(tmp_path / "folder", SEED))
    single = catalog.library.add(flux.write_single(tmp_path / "all.safetensors", SEED), variant="dev")
    assert single.digest == folder.digest
    swapped = [one.name for one in single.manifest.component("transformer").tensors if one.swap_halves]
    assert swapped == ["norm_out.linear.weight", "norm_out.linear.bias"]
    assert manifests.from_json(single.path, manifests.to_json(single.manifest)) == single.manifest
    in_json = manifests.to_json(folder.manifest)["components"]
    assert {len(tensor) for component in in_json for tensor in component["tensors"]} == {8}


def test_diffusers_converts_the_original_names_to_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # The converter knows only the published width.
    source = Path(single_file_utils.__file__).read_text()
    begin = source.index("def convert_flux_transformer_checkpoint_to_diffusers")
    text = source[begin : source.index("\ndef ", begin + 1)].replace("inner_dim = 3072", "inner_dim = 64")
    names: dict[str, object] = {"torch": torch}
    exec(text, names)
    for variant in ("dev", "schnell"):
        module = flux.modules(SEED, variant)["transformer"]
        converted = names["convert_flux_transformer_checkpoint_to_diffusers"](flux.original_names(module, variant))  # type: ignore[operator]
        state = module.state_dict()
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[name], state[name]) for name in state)


def test_a_transformer_takes_the_other_components_from_files_of_their_own(
    root: Path, tmp_path: Path, right: dict[str, str]
) -> None:
    names = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl", "transformer": "flux1-dev", "vae": "ae"}
    for role, tensors in flux.parts(SEED).items():
        save_file(tensors, tmp_path / f"{names[role]}.safetensors")
    path = tmp_path / "flux1-dev.safetensors"
    found = identify(path)
    assert found.layout is not None
    assert found.layout.missing == ("text_encoder", "text_encoder_2", "vae")
    assert "single blocks, alone" in found.rule
    catalog = Catalog.under(root)
    with pytest.raises(UnsupportedModelError, match=r"no text_encoder .* and no text_encoder_2 \(t5 4096x24\)"):
        catalog.library.add(path, variant="dev")
    with pytest.raises(UnsupportedModelError, match=r"which variant: use .* with --variant dev or --variant krea or"):
        catalog.library.add(path)
    for name in ("clip_l", "t5xxl", "ae"):
        catalog.adapters.add(tmp_path / f"{name}.safetensors")
    model = catalog.library.add(path, variant="dev")
    assert model.sources == {"text_encoder": "clip_l", "text_encoder_2": "t5xxl", "vae": "ae"}
    assert pixels(root, model.name) == right["dev"]


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.double_blocks.1.txt_attn.qkv.weight",
        "model.diffusion_model.single_blocks.1.linear1.bias",
        "model.diffusion_model.final_layer.adaLN_modulation.1.weight",
        "model.diffusion_model.img_in.weight",
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "vae.decoder.conv_out.weight",
    ],
)
def test_a_missing_tensor_and_a_wrong_shape_are_named(name: str, tmp_path: Path) -> None:
    tensors, path = flux.single_tensors(SEED), tmp_path / "part.safetensors"
    for changed in (None, torch.zeros(3, 5, 7)):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(kept if changed is None else {**kept, name: changed}, path)
        with pytest.raises(IncompleteModelError) as error:
            identify(path)
        assert name.removeprefix("model.diffusion_model.") in str(error.value)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "more.safetensors"
    save_file({**flux.single_tensors(SEED), "model.diffusion_model.glow.weight": torch.zeros(1)}, path)
    with pytest.raises(IncompleteModelError, match="glow"):
        identify(path)


def test_a_transformer_that_reads_a_picture_is_refused_by_its_size(tmp_path: Path) -> None:
    tensors = flux.original_names(flux.modules(SEED)["transformer"])
    tensors["img_in.weight"] = torch.zeros(64, 128)
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"of no known variant \(128-64x2\+2\)"):
        identify(tmp_path / "control.safetensors")


def test_flux2_dev_is_named_and_not_supported(tmp_path: Path) -> None:
    names = (
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "guidance_in.in_layer.weight",
    )
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    found = identify(tmp_path / "other.safetensors")
    assert (found.base, found.layout) == ("flux2", None)


def test_settings_come_back_from_shapes_in_both_names() -> None:
    for guidance in (True, False):
        config = FluxConfig(64, 16, 3072, 19, 38, 128, 4096, 768, guidance)
        assert infer({row.name: row.shape for row in config.rows()}) == config
        shapes = {
            source.name: (source.part(row.shape[0])[1], *row.shape[1:])
            for row in config.rows()
            for source in row.sources[-1:]
        }
        assert infer(shapes) == config


@pytest.mark.parametrize("variant", thinned(["dev", "schnell"]))
def test_diffusers_draws_the_same_with_an_exported_folder(
    variant: str, root: Path, tmp_path: Path, right: dict[str, str]
) -> None:
    path = flux.write_single(tmp_path / "all.safetensors", SEED, variant)
    model = Catalog.under(root).library.add(path, variant=variant)
    export.to_diffusers(model, tmp_path / "exported")
    pipe: Any = diffusers.FluxPipeline.from_pretrained(tmp_path / "exported")
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae):
        aligned(module)
    torch.set_num_threads(1)
    image = pipe(
        "a red apple",
        num_inference_steps=2,
        width=64,
        height=48,
        generator=torch.Generator("cpu").manual_seed(3),
        max_sequence_length=512 if variant == "dev" else 256,
    ).images[0]
    assert hashlib.sha256(image.tobytes()).hexdigest() == right[variant]
    assert Catalog.under(root).library.add(tmp_path / "exported", name="again").digest == model.digest


def lora(path: Path, name: str, rows: int, columns: int, down: str, up: str) -> Path:
    generator = torch.Generator().manual_seed(1)
    factors = {f"{name}{down}": (4, columns), f"{name}{up}": (rows, 4)}
    save_file({key: torch.randn(shape, generator=generator) for key, shape in factors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "rows", "columns", "down", "up"),
    [
        ("transformer.single_transformer_blocks.0.proj_mlp", 256, 64, ".lora_A.weight", ".lora_B.weight"),
        ("lora_unet_double_blocks_0_img_mlp_0", 256, 64, ".lora_down.weight", ".lora_up.weight"),
        ("diffusion_model.double_blocks.0.txt_attn.proj", 64, 64, ".lora_A.weight", ".lora_B.weight"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 192, 64, ".lora_down.weight", ".lora_up.weight"),
        ("lora_unet_single_blocks_0_linear1", 448, 64, ".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_an_adapter_changes_the_picture(
    name: str, rows: int, columns: int, down: str, up: str, root: Path, tmp_path: Path, right: dict[str, str]
) -> None:
    path = flux.write_folder(tmp_path / "folder", SEED)
    own = lora(tmp_path / "own.safetensors", name, rows, columns, down, up)
    request = safelight.Request("a red apple", str(path), seed=3, steps=2, width=64, height=48, loras=(Lora(str(own)),))
    # Chroma has the same blocks.
    assert identify(own).base is None
    assert next(safelight.open_engine(root).generate(request)).pixels_sha256 != right["dev"]


@pytest.mark.parametrize("name", ["single_blocks.1.linear1", "final_layer.adaLN_modulation.1"])
def test_an_adapter_of_an_original_matrix_draws_what_the_changed_file_draws(
    name: str, root: Path, tmp_path: Path
) -> None:
    tensors = flux.single_tensors(SEED)
    weight = tensors[f"model.diffusion_model.{name}.weight"]
    own = lora(
        tmp_path / "own.safetensors", f"diffusion_model.{name}", *weight.shape, ".lora_A.weight", ".lora_B.weight"
    )
    down, up = (load_file(own)[f"diffusion_model.{name}.lora_{letter}.weight"] for letter in "AB")
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    save_file(tensors, plain)
    save_file({**tensors, f"model.diffusion_model.{name}.weight": weight + up @ down}, merged)
    library = Catalog.under(root).library
    plain_model, merged_model = (library.add(path, variant="dev").name for path in (plain, merged))
    request = safelight.Request(
        "a red apple", plain_model, seed=3, steps=2, width=64, height=48, loras=(Lora(str(own)),)
    )
    engine = safelight.open_engine(root)
    found = [next(engine.generate(one)) for one in (request, replace(request, model=merged_model, loras=()))]
    one, other = (np.frombuffer(image.pixels, np.uint8).astype(int) for image in found)
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("architecture", "variant"), [("FLUX.1-Kontext-dev", "kontext"), ("flux-1-krea-dev", "krea"), ("flux-1-dev", None)]
)
def test_the_metadata_of_a_file_tells_its_variant(architecture: str, variant: str | None, tmp_path: Path) -> None:
    config = flux.configs()["transformer"]
    tensors = flux.original_names(random_module("flux", config, torch.Generator()))
    save_file(tensors, tmp_path / "net.safetensors", {"modelspec.architecture": architecture})
    assert identify(tmp_path / "net.safetensors").variant == variant
