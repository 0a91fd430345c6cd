"""Components are known by content, whatever file brought them; one rule says what a name, a path and a digest are."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from support import checkpoints

from safelight.catalog import paths, records
from safelight.catalog.catalog import Catalog
from safelight.errors import IntegrityError, ModelNotFoundError
from safelight.request.schema import Request
from safelight.resolve.contents import find_contents
from safelight.resolve.resolve import resolve


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with the same VAE and text encoder, in two layouts, and that VAE alone."""
    home = tmp_path_factory.mktemp("files")
    checkpoints.write_single(home / "one.safetensors", "sd1", 1)
    tensors = load_file(home / "one.safetensors")
    save_file({name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()
               if name.startswith("first_stage_model.")}, home / "vae.safetensors")  # fmt: skip
    name = "model.diffusion_model.input_blocks.0.0.bias"
    save_file({**tensors, name: tensors[name] + torch.ones(())}, home / "two.safetensors")
    return home


@pytest.fixture
def catalog(files: Path, tmp_path: Path) -> Catalog:
    for file in files.iterdir():
        shutil.copy(file, tmp_path)
    found = Catalog.under(tmp_path / "root")
    found.library.add(tmp_path / "one.safetensors")
    found.library.add(tmp_path / "two.safetensors")
    found.adapters.add(tmp_path / "vae.safetensors")
    return found


def test_a_component_is_found_in_every_model_and_adapter_that_has_it(catalog: Catalog) -> None:
    one, two = catalog.library.get("one"), catalog.library.get("two")
    vae = one.manifest.component("vae").digest
    assert [card.name for card in catalog.cards_with_component(vae)] == ["one", "two", "vae"]
    assert [card.name for card in catalog.cards_with_component(two.manifest.component("unet").digest)] == ["two"]
    assert catalog.cards_with_component("0" * 64) == []
    assert catalog.component("0" * 64) is None


def test_a_component_is_used_from_another_file_when_its_own_is_gone(catalog: Catalog, tmp_path: Path) -> None:
    vae = catalog.library.get("one").manifest.component("vae").digest
    for gone in ("one", "two"):
        found = catalog.component(vae)
        assert found is not None
        assert found.tensors[0].path.stem == gone
        (tmp_path / f"{gone}.safetensors").unlink()
    alone = catalog.component(vae)
    assert alone is not None
    assert alone.tensors[0].path.stem == "vae"


def test_a_job_finds_its_vae_by_content_after_its_source_was_removed(catalog: Catalog, tmp_path: Path) -> None:
    other = checkpoints.write_single(tmp_path / "other.safetensors", "sd1", 2)
    catalog.library.add(other)
    job = resolve(Request("x", "other", vae="one"), catalog)
    model = catalog.library.get("other")
    catalog.library.remove("one")
    (part,) = find_contents(job, catalog, model).replacements
    assert part.digest == job.parts[0].digest
    assert part.tensors[0].path.stem == "two"
    catalog.library.remove("two")
    catalog.adapters.remove("vae")
    with pytest.raises(IntegrityError, match="no model and no adapter has a component of the content"):
        find_contents(job, catalog, model)


def test_files_used_by_their_path_are_in_the_index_and_read_once(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    first = Catalog.under(root)
    model = first.library.find(str(files / "one.safetensors"))
    vae = first.adapters.find(str(files / "vae.safetensors"))
    assert [card.name for card in first.cards_with_component(vae.component.digest)] == ["one", "vae"]
    list(Catalog.under(root).library.records.used_by_path())
    reads: list[Path] = []
    read = records.read
    monkeypatch.setattr(records, "read", lambda path, folder=None: (reads.append(path), read(path, folder))[1])
    second = Catalog.under(root)
    assert list(second.library.records.used_by_path("0" * 64)) == []
    assert reads == []
    assert [found.digest for found in second.library.records.used_by_path(model.digest)] == [model.digest]
    assert len(reads) == 1


def test_one_rule_for_names_paths_and_digests(catalog: Catalog, tmp_path: Path) -> None:
    one = catalog.library.get("one")
    for reference in ("one", str(tmp_path / "one.safetensors"), one.digest):
        assert catalog.library.find(reference).digest == one.digest
    vae = catalog.adapters.get("vae")
    assert catalog.adapters.find(vae.digest).name == "vae"
    assert (paths.is_path("a/b"), paths.is_path("b.safetensors"), paths.is_path("b.v2")) == (True, True, False)
    assert (paths.is_digest(one.digest), paths.is_digest(one.digest[:10])) == (True, False)
    with pytest.raises(ModelNotFoundError):
        catalog.library.find("0" * 64)


def test_the_index_holds_records_components_and_inputs_and_may_be_deleted(catalog: Catalog, tmp_path: Path) -> None:
    PILImage.new("RGB", (24, 16), "red").save(tmp_path / "picture.png")
    digest = catalog.inputs.store("image", (tmp_path / "picture.png").read_bytes())
    assert catalog.inputs.size(digest) == (24, 16)
    catalog.library.cards()
    catalog.adapters.cards()
    file = catalog.library.root / "index.db"
    with sqlite3.connect(file) as database:
        names = [name for (name,) in database.execute("SELECT file FROM records ORDER BY file")]
        shared = database.execute(
            "SELECT count(*) FROM components GROUP BY digest ORDER BY count(*) DESC LIMIT 1"
        ).fetchone()
        inputs = database.execute("SELECT digest, width, height FROM inputs").fetchall()
        database.execute("UPDATE inputs SET width = 40")
    assert names == ["one.json", "two.json", "vae.json"]
    assert shared == (3,)
    assert inputs == [(digest, 24, 16)]
    assert catalog.inputs.size(digest) == (40, 16)
    file.unlink()
    assert catalog.inputs.size(digest) == (24, 16)
    assert [card.name for card in Catalog.under(catalog.library.root).library.cards()][:2] == ["one", "two"]


def test_an_index_of_an_earlier_version_is_created_again(catalog: Catalog) -> None:
    file = catalog.library.root / "index.db"
    file.unlink(missing_ok=True)
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 1")
        database.execute("CREATE TABLE cards (folder TEXT, file TEXT, hint TEXT, card TEXT)")
    fresh = Catalog.under(catalog.library.root)
    assert {card.name for card in fresh.library.cards()} >= {"one", "two"}
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM records").fetchone() == (2,)
        assert database.execute("SELECT name FROM sqlite_master WHERE name = 'cards'").fetchone() is None


def test_a_model_in_quarantine_gives_no_component(catalog: Catalog, tmp_path: Path) -> None:
    one = catalog.library.get("one")
    unet = one.manifest.component("unet").digest
    wrong = replace(one, manifest=replace(one.manifest, digest="0" * 64))
    with pytest.raises(IntegrityError):
        catalog.library.recheck_after_corruption(wrong)
    assert catalog.library.quarantine_reason(replace(one, manifest=wrong.manifest))
    assert catalog.component(unet) is not None
