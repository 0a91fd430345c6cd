"""A family's checkpoints have the same digests and draw the same pixels, whatever form of files they come in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support import naming
from support.families import LDM, TinyFamily, copy_tokenizer, read_components, tiny_families
from support.scale import thinned

import safelight
from safelight.assembly import export
from safelight.catalog.catalog import Catalog
from safelight.catalog.model import Model
from safelight.workers.local_engine import LocalEngine

SEED = 5


@pytest.fixture(scope="module", params=thinned(tiny_families(), 4))
def tiny_family(request: pytest.FixtureRequest) -> TinyFamily:
    return tiny_families()[request.param]


@pytest.fixture(scope="module")
def folder(tiny_family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family.write_folder(tmp_path_factory.mktemp("forms") / "folder", SEED)


@pytest.fixture(scope="module")
def right(tiny_family: TinyFamily, folder: Path, shared_engine: LocalEngine) -> tuple[str, str]:
    """The digest and the pixels of the diffusers folder."""
    name = f"folder of {tiny_family.name} {tiny_family.variant}"
    return drawn(tiny_family, shared_engine, shared_engine.library.add(folder, name, variant=tiny_family.variant))


def drawn(tiny_family: TinyFamily, engine: LocalEngine, model: Model) -> tuple[str, str]:
    reference = model.name if model.origin == "added" else str(model.path)
    return model.digest, next(engine.generate(tiny_family.ask(reference))).pixels_sha256


def test_a_file_for_each_component(tiny_family: TinyFamily, root: Path, tmp_path: Path, right: tuple[str, str]) -> None:
    files = tiny_family.write_files(tmp_path, SEED)
    catalog = Catalog.under(root)
    for role, file in files.items():
        if role != tiny_family.family.denoiser:
            catalog.adapters.add(file)
    model = catalog.library.add(files[tiny_family.family.denoiser], variant=tiny_family.variant)
    denoiser = tiny_family.family.denoiser
    assert model.sources.keys() == {role for role in tiny_family.roles if tiny_family.place_in_files(role) != denoiser}
    assert drawn(tiny_family, safelight.open_engine(root), model) == right


@pytest.mark.parametrize("which", thinned([LDM, 0]))
def test_one_file_for_all(
    which: int, tiny_family: TinyFamily, folder: Path, root: Path, tmp_path: Path, right: tuple[str, str]
) -> None:
    named = read_components(folder)
    prefixes = {part.role: part.prefixes[0] if which else f"{part.role}." for part in tiny_family.family.components}
    for role, config in tiny_family.configs().items():
        component = tiny_family.family.component(role)
        number = LDM if component.within else which
        named[component.folder] = naming.in_files(config, named[component.folder], number)
    whole = {name: one for role, some in named.items() for name, one in naming.prefixed(prefixes[role], some).items()}
    save_file(whole, tmp_path / "all.safetensors")
    for component in tiny_family.family.components:
        copy_tokenizer(component, folder, tmp_path)
    model = Catalog.under(root).library.add(tmp_path / "all.safetensors", variant=tiny_family.variant)
    assert drawn(tiny_family, safelight.open_engine(root), model) == right


def test_an_exported_folder(
    tiny_family: TinyFamily, folder: Path, shared_engine: LocalEngine, tmp_path: Path, right: tuple[str, str]
) -> None:
    """It has the same digest and pixels, the same variant, and all tensors that the libraries expect."""
    if tiny_family.family.export_problem or tiny_family.family.variants[tiny_family.variant].export_problem:
        pytest.skip("the models of this family cannot be exported")
    model = shared_engine.library.find(str(folder))
    export.to_diffusers(model, tmp_path / "exported")
    again = shared_engine.library.find(str(tmp_path / "exported"))
    assert again.variant == model.variant == tiny_family.variant
    assert drawn(tiny_family, shared_engine, again) == right
    index = json.loads((tmp_path / "exported/model_index.json").read_text())
    for role in tiny_family.roles:
        library, kind = index[role]
        load: Any = getattr(importlib.import_module(library), kind).from_pretrained
        module, told = load(tmp_path / "exported" / role, output_loading_info=True)
        left_over = tiny_family.family.left_over
        assert [name for name in told["missing_keys"] if left_over(f"{role}.{name}") is None] == [], role
        assert not told["unexpected_keys"], role
        assert not told["mismatched_keys"], role
        before = json.loads((folder / role / "config.json").read_text())
        for setting in {"num_hidden_layers", "num_layers", "n_layers"} & before.keys():
            assert getattr(module.config, setting) == before[setting], (role, setting)
