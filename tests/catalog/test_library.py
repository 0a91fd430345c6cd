"""The library: identity is content; times and sizes are only a hint, in either direction."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints

import safelight
from safelight.catalog import chosen_previews, describe
from safelight.catalog import library as library_module
from safelight.catalog.defaults import set_defaults
from safelight.catalog.library import Library
from safelight.errors import (
    CorruptFileError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    UnsupportedModelError,
)


@pytest.fixture
def library(root: Path) -> Library:
    return Library(root)


def own(library: Library) -> list[str]:
    return [model.name for model in library.models() if model.origin != "starter"]


def test_the_same_weights_have_the_same_digest_in_every_form(library: Library, tiny: Path) -> None:
    digests = {library.add(tiny / name).digest for name in ("a.safetensors", "old.ckpt", "folder")}
    assert len(digests) == 1
    assert library.add(tiny / "b.safetensors").digest not in digests
    assert sorted(own(library)) == ["a", "b", "folder", "old"]


def test_adding_reads_all_and_tells(library: Library, tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = library.add(tiny / "a.safetensors", on_bytes=lambda done, total: seen.append((done, total)))
    read = sum(t.nbytes for c in model.manifest.components for t in c.tensors)
    assert seen[-1][0] == read
    assert library.get("a") == model


def test_names(library: Library, tiny: Path, tmp_path: Path) -> None:
    library.add(tiny / "a.safetensors", "first")
    library.add(tiny / "a.safetensors", "first")
    with pytest.raises(InputError, match="taken"):
        library.add(tiny / "b.safetensors", "first")
    for bad in ("", "../x", "a/b", ".hidden", "x" * 200, "a:b", "a,b", " a", "a\nb", "-a", "<a>"):
        with pytest.raises(InputError, match=r"b\.safetensors: .* is not a valid name"):
            library.add(tiny / "b.safetensors", bad)
    with pytest.raises(InputError, match="taken"):
        library.add(tiny / "a.safetensors", "First")
    with pytest.raises(ModelNotFoundError, match="first"):
        library.get("frist")
    library.remove("first")
    assert "first" not in own(library)
    assert (tiny / "a.safetensors").exists()


NAMES = {
    "Dream Shäper (v8).safetensors": "Dream Shäper (v8)",
    "国风.safetensors": "国风",
    "majicMIX realistic 麦橘写实_v7.safetensors": "majicMIX realistic 麦橘写实_v7",
    "my style v2.safetensors": "my style v2",
    "look, soft.safetensors": "look soft",
    "photo: v2 (final).safetensors": "photo v2 (final)",
    "CON.safetensors": "CON",
    unicodedata.normalize("NFD", "Schön.safetensors"): "Schön",
    "é" * 70 + ".safetensors": "é" * 70,
}


@pytest.mark.parametrize("file", NAMES)
def test_names_keep_the_users_words(file: str, library: Library, tiny: Path, tmp_path: Path) -> None:
    name = NAMES[file]
    shutil.copy(tiny / "a.safetensors", tmp_path / file)
    added = library.add(tmp_path / file)
    assert added.name == name
    again = Library(library.root)
    for called in (name, unicodedata.normalize("NFD", name), Path(file).stem):
        assert again.get(called).digest == added.digest
    (record,) = (library.root / "models").glob("*.json")
    assert len(record.name.encode()) < 200
    assert not set(record.name) & set(' :*?"<>|/\\')
    assert record.stem.upper() != "CON"
    library.rename(name, "新名")
    assert again.get("新名").digest == added.digest
    # Its file still has its name, unless a sign in that could be none of a name's.
    of_file = unicodedata.normalize("NFC", Path(file).stem) == name
    with pytest.raises(InputError, match="新名" if of_file else f"no model named {re.escape(repr(name))}"):
        again.remove(name)
    again.remove("新名")
    assert not own(library)


def test_renaming_keeps_what_was_before(library: Library, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(tiny / "a.safetensors", path)
    first = library.add(path, "dream").digest
    shutil.copy(tiny / "b.safetensors", path)
    library.add(path, "dream")
    shutil.copy(tiny / "a.safetensors", tmp_path / "other.safetensors")
    library.add(tmp_path / "other.safetensors", "other")
    for taken in ("other", "OTHER", "starter-noto"):
        with pytest.raises(InputError, match="taken"):
            library.rename("dream", taken)
    with pytest.raises(InputError, match="starter"):
        library.rename("starter-noto", "mine")
    assert library.rename("dream", "Dream").name == "Dream"
    assert library.rename("Dream", "v8").name == "v8"
    assert {model.digest for model in library.earlier("v8")} == {first}
    assert set(own(library)) == {"other", "v8"}


def test_a_model_that_was_removed_while_it_was_verified_stays_removed(
    library: Library, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(tiny / "a.safetensors", path)
    library.add(path)
    os.utime(path, (1, 1))
    library.verify("m", lambda done, total: library.remove("m") if own(library) else None)
    assert not own(library)
    assert not own(Library(library.root))


def test_state_30_an_unknown_model_is_never_another_one(library: Library, tiny: Path) -> None:
    library.add(tiny / "a.safetensors")
    for name in ("~nobody-of-that-name/x.safetensors", "x" * 5000 + ".safetensors", "a\0.safetensors"):
        with pytest.raises(InputError):
            library.find(name)
    for name in ("A", "a.safetensors", str(tiny / "none.safetensors"), "../models/a", ""):
        with pytest.raises(InputError):
            library.find(name)


@pytest.mark.parametrize("step", [-1_000_000_000, 0, 1_000_000_000])
def test_load_03_and_05_a_replaced_file_is_seen_whatever_its_time(
    library: Library, tiny: Path, tmp_path: Path, step: int
) -> None:
    path = tmp_path / "model.safetensors"
    checkpoints.write_single(path, "sd1", 1)
    old = path.stat()
    model = library.add(path)
    checkpoints.write_single(path, "sd1", 8)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + step))
    with pytest.raises(IntegrityError, match="its content changed"):
        library.ensure_unchanged(model)
    with pytest.raises(IntegrityError, match="its content changed"):
        library.verify("model")
    assert library.add(path).digest != model.digest


def test_a_touched_file_with_the_same_content_is_accepted(library: Library, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    model = library.add(path)
    os.utime(path, ns=(1, 1))
    assert model.manifest.changed_files() == [path]
    fresh = library.ensure_unchanged(model)
    assert fresh.digest == model.digest
    assert fresh.manifest.changed_files() == []
    assert library.get("m").manifest.changed_files() == []
    path.unlink()
    with pytest.raises(IntegrityError, match="gone"):
        library.ensure_unchanged(model)


def test_load_07_a_file_overwritten_in_place_gives_an_error_not_other_pixels(root: Path, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    engine = safelight.open_engine(root)
    engine.library.add(path)
    request = safelight.Request("red apple", "m", steps=1, width=64, height=64)
    right = next(engine.generate(request)).pixels_sha256
    good = path.read_bytes()
    other = checkpoints.write_single(tmp_path / "other.safetensors", "sd1", 2).read_bytes()
    with path.open("r+b") as file:
        file.write(other)
    with pytest.raises(IntegrityError):
        next(engine.generate(request))
    with path.open("r+b") as file:
        file.truncate(len(good) // 2)
    with pytest.raises(IntegrityError):
        next(engine.generate(request))
    path.write_bytes(good)
    assert next(engine.generate(request)).pixels_sha256 == right


def test_load_04_one_bit_anywhere_changes_the_digest(library: Library, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1)
    model = library.add(path)
    data = bytearray(path.read_bytes())
    place = model.manifest.component("unet").tensors[40]
    data[place.offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=place.name.replace(".", r"\.")):
        library.verify("m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused(library: Library, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = checkpoints.write_single(tmp_path / "m.safetensors", "sd1", 1, dtype=dtype)
    tensors = load_file(path)
    tensors["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = value
    save_file(tensors, path)
    with pytest.raises(CorruptFileError, match=r"conv_out\.weight\) holds NaN or infinity"):
        library.add(path)
    assert own(library) == []


def test_what_is_not_a_checkpoint_is_refused_by_what_it_is(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_a_attn2_to_k.lora_down.weight": torch.zeros(4, 768)}, path)
    with pytest.raises(UnsupportedModelError, match="is a lora for sd1"):
        library.add(path)


def test_conversions_live_and_die_with_the_record(library: Library, root: Path, tiny: Path) -> None:
    model = library.add(tiny / "old.ckpt")
    assert model.format == "pickle"
    assert [p.name for p in (root / "converted").glob("*/*")] == ["model.safetensors"]
    library.verify("old")
    library.remove("old")
    assert not list((root / "converted").glob("*/*"))


def test_damaged_records_are_refused_by_name(library: Library, root: Path, tiny: Path) -> None:
    library.add(tiny / "a.safetensors")
    path = root / "models/a.json"
    whole = json.loads(path.read_text())
    for change in (
        {"manifest": {}},
        {"manifest": {**whole["manifest"], "digest": "0" * 64}},
        {"manifest": {**whole["manifest"], "version": 99}},
        {"surprise": 1},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(CorruptFileError, match=r"a\.json"):
            library.get("a")
    path.write_text("{")
    with pytest.raises(CorruptFileError, match="not JSON"):
        library.get("a")


def test_load_10_a_damaged_record_stops_nobody_else(library: Library, root: Path, tiny: Path) -> None:
    library.add(tiny / "a.safetensors")
    library.add(tiny / "b.safetensors")
    (root / "models/a.json").write_text("{")
    assert own(library) == ["b"]
    assert [error.path.name for error in library.damaged()] == ["a.json"]
    assert library.find("b").name == "b"
    assert library.add(tiny / "a.safetensors").name == "a"
    assert library.damaged() == []


def test_load_03_a_replaced_pickle_is_seen_although_its_conversion_is_used(library: Library, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.ckpt", "sd1", 1)
    model = library.add(path)
    by_path = library.find(str(path))
    assert library.ensure_unchanged(model).digest == model.digest
    checkpoints.write_single(path, "sd1", 2)
    with pytest.raises(IntegrityError, match="its content changed"):
        library.ensure_unchanged(model)
    assert library.find(str(path)).digest != by_path.digest
    assert library.add(path).digest != model.digest


def test_a_refused_pickle_leaves_no_conversion_behind(library: Library, root: Path, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.ckpt", "sd1", 1)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.diffusion_model.out.2.weight"][0] = float("nan")
    torch.save(content, path)
    with pytest.raises(CorruptFileError, match="NaN"):
        library.add(path)
    assert not [p for p in (root / "converted").rglob("*") if p.is_file()]


def test_a_damaged_record_is_named_and_can_be_removed(library: Library, root: Path, tiny: Path) -> None:
    """A record proves itself: whichever field is edited, it is not believed."""
    library.add(tiny / "a.safetensors")
    path = root / "models/a.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(CorruptFileError, match="checksum"):
        library.get("a")
    assert [error.path for error in library.damaged()] == [path]
    library.remove("a")
    assert library.damaged() == []


def test_a_folder_whose_settings_change_is_not_the_same_model(library: Library, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "m", "sd1", 1)
    model = library.add(folder)
    assert library.ensure_unchanged(model) is model
    settings = folder / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(IntegrityError, match="prediction_type was epsilon, its files now say v_prediction"):
        library.ensure_unchanged(model)
    settings.write_text(json.dumps({"prediction_type": "epsilon"}))
    assert library.ensure_unchanged(model).digest == model.digest


def test_a_file_that_would_be_preferred_is_seen_when_it_comes_later(library: Library, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "m", "sd1", 1, variant="fp16")
    other = checkpoints.write_folder(tmp_path / "other", "sd1", 2)
    model = library.add(folder)
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(other / name, folder / name)
    with pytest.raises(IntegrityError, match="its content changed"):
        library.ensure_unchanged(model)
    (folder / name).unlink()
    assert library.ensure_unchanged(model).digest == model.digest


def test_the_users_word_stays_the_users_word(library: Library, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shutil.copy(tiny / "a.safetensors", path)
    model = library.add(path, prediction_type="v_prediction")
    os.utime(path, ns=(1, 1))
    assert library.ensure_unchanged(model).prediction_type == "v_prediction"


def test_two_that_add_under_one_name_do_not_overwrite_each_other(
    library: Library, root: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(home: Path, path: Path, *rest: Any) -> object:
        described = describe.read_model(home, path, *rest)
        if path.name == "a.safetensors":
            Library(root).add(tiny / "b.safetensors", "same")
        return described

    monkeypatch.setattr("safelight.catalog.library.read_model", slow)
    with pytest.raises(InputError, match="taken"):
        library.add(tiny / "a.safetensors", "same")
    assert library.get("same").path.name == "b.safetensors"


def test_conversions_that_nobody_needs_are_swept(library: Library, root: Path, tmp_path: Path) -> None:
    path = checkpoints.write_single(tmp_path / "m.ckpt", "sd1", 1)
    model = library.find(str(path))
    kept = root / "converted" / model.digest
    os.utime(kept, (1, 1))
    library.find(str(checkpoints.write_single(tmp_path / "n.safetensors", "sd1", 2)))
    assert kept.exists()
    path.unlink()
    library.find(str(checkpoints.write_single(tmp_path / "o.safetensors", "sd1", 3)))
    assert not kept.exists()


def test_a_conversion_that_is_a_part_of_another_model_stays(library: Library, root: Path, tmp_path: Path) -> None:
    """Its folder has its own digest, and the model that uses a part of it has another one."""
    donor = checkpoints.write_single(tmp_path / "donor.ckpt", "sd1", 1)
    library.add(donor)
    library.add(checkpoints.write_single(tmp_path / "m.ckpt", "sd1", 2))
    changed = library.set_choices("m", parts=[("VAE", "donor")])
    assert changed.digest not in {home.name for home in (root / "converted").iterdir()}
    library.remove("donor")
    for home in (root / "converted").iterdir():
        os.utime(home, (1, 1))
    library.find(str(checkpoints.write_single(tmp_path / "o.safetensors", "sd1", 3)))
    assert library.ensure_unchanged(library.get("m")).digest == changed.digest


def test_a_conversion_that_is_gone_is_made_again(library: Library, root: Path, tmp_path: Path) -> None:
    """A backup has none."""
    model = library.add(checkpoints.write_single(tmp_path / "m.ckpt", "sd1", 1))
    shutil.rmtree(root / "converted")
    assert library.ensure_unchanged(library.get("m")).digest == model.digest
    shutil.rmtree(root / "converted")
    assert library.verify("m").digest == model.digest


def test_a_removed_model_leaves_nothing_to_the_next_one_of_its_name(
    library: Library, tiny: Path, tmp_path: Path
) -> None:
    def add(seed: int, name: str) -> str:
        path = tmp_path / f"{name}.safetensors"
        return library.add(checkpoints.write_single(path, "sd1", seed), name).digest

    first, second = add(1, "a"), add(2, "a")
    assert [one.digest for one in library.earlier("a")] == [first]
    chosen = chosen_previews.place(library.root, "model", "a")
    chosen.parent.mkdir()
    chosen.write_bytes(b"a picture")
    library.rename("a", "b")
    assert not chosen.exists()
    assert chosen_previews.place(library.root, "model", "b").read_bytes() == b"a picture"
    library.remove("b")
    assert not list(chosen.parent.iterdir())
    assert library.earlier("b") == []
    # What an earlier version left of a removed model does not stand in the way.
    add(1, "a"), add(2, "a")
    stale = library.root / "models/earlier/b"
    stale.mkdir(parents=True)
    (stale / "1.json").write_text("{}")
    library.rename("a", "b")
    assert [one.digest for one in library.earlier("b")] == [first]
    assert library.get("b").digest == second


def test_defaults_that_are_set_while_a_file_is_read_stay(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add(checkpoints.write_single(tmp_path / "a.safetensors", "sd1", 1), "a")
    model, read = library.get("a"), library_module.read_again

    def read_late(*arguments: Any) -> Any:
        set_defaults(library, "a", {"steps": 7})
        return read(*arguments)

    monkeypatch.setattr(library_module, "read_again", read_late)
    os.utime(tmp_path / "a.safetensors")
    assert library.ensure_unchanged(model).defaults == {"steps": 7}
    assert library.get("a").defaults == {"steps": 7}


def test_paths_are_measured_once(library: Library, tiny: Path, root: Path) -> None:
    first: list[int] = []
    library.find(str(tiny / "a.safetensors"), lambda done, _: first.append(done))
    again: list[int] = []
    library.find(str(tiny / "a.safetensors"), lambda done, _: again.append(done))
    assert first
    assert not again
    assert own(library) == []


def test_a_name_goes_back_to_what_it_named(tmp_path: Path, tiny: Path) -> None:
    library = Library(tmp_path / "root")
    path = tmp_path / "dream.safetensors"
    path.write_bytes((tiny / "a.safetensors").read_bytes())
    first = library.add(path)
    with pytest.raises(InputError, match="no earlier content"):
        library.roll_back("dream")
    (tmp_path / "dream-old.bak").write_bytes(path.read_bytes())
    path.write_bytes((tiny / "b.safetensors").read_bytes())
    second = library.add(path)
    assert [model.digest for model in library.earlier("dream")] == [first.digest]
    back = library.roll_back("dream")
    assert (back.digest, back.path.name) == (first.digest, "dream-old.bak")
    assert library.verify("dream").digest == first.digest
    # What it was meanwhile is the last earlier one now.
    assert library.roll_back("dream").digest == second.digest
    assert library.roll_back("dream", first.digest[:8]).digest == first.digest
    (tmp_path / "dream-old.bak").unlink()
    assert library.roll_back("dream").digest == second.digest
    with pytest.raises(InputError, match="is gone, and no file"):
        library.roll_back("dream", first.digest[:8])
    assert library.get("dream").digest == second.digest


def test_a_conversion_that_was_replaced_is_kept_to_go_back_to(tmp_path: Path, tiny: Path) -> None:
    library = Library(tmp_path / "root")
    path = tmp_path / "dream.ckpt"
    path.write_bytes((tiny / "old.ckpt").read_bytes())
    first = library.add(path)
    checkpoints.write_single(path, "sd1", 9)
    assert library.add(path).digest != first.digest
    assert library.roll_back("dream").digest == first.digest
