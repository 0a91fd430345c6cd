"""Models of other programs are taken over without a copy, and are read when they are used for the first time."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import adapters, other_programs
from support.other_programs import PROGRAMS, WORDS

import safelight
from safelight.catalog import importing, library
from safelight.catalog.catalog import Catalog
from safelight.catalog.defaults import set_defaults
from safelight.catalog.importing import ImportedFile, import_files
from safelight.catalog.other_programs import read
from safelight.errors import CorruptFileError, InputError, ModelNotFoundError, RequestError
from safelight.request.adapters import Purpose
from safelight.resolve.resolve import resolve
from safelight.weights import manifest

RIGHT: dict[str, tuple[str, dict[str, str]]] = {
    "A1111": (
        "AUTOMATIC1111 or Forge",
        {
            "国风v3": "checkpoint",
            "My Style v2": "checkpoint",
            "glow.style": "lora",
            "nice.vae": "vae",
            "easy": "textual_inversion",
        },
    ),
    "ComfyUI": ("ComfyUI", {"a": "checkpoint", "a (more)": "checkpoint", "one": "lora"}),
    "InvokeAI": (
        "InvokeAI",
        {"Dreamy XL": "checkpoint", "Dreamy XL (4567)": "checkpoint", "Fine VAE": "vae", "Glow": "lora"},
    ),
    "SwarmUI": ("SwarmUI", {"a": "checkpoint", "one": "lora"}),
    "kohya": ("", {"style": "lora", "style-000001": "lora", "style-000002": "lora"}),
}
"""What each program's folder has, by name."""


def bring(path: Path, root: Path, variant: str = "") -> list[ImportedFile]:
    return list(import_files(read(path).candidates, Catalog.under(root), lambda _: variant))


def everything_below(path: Path, besides: Path) -> dict[str, tuple[int, int]]:
    found = [one for one in path.rglob("*") if not one.is_relative_to(besides)]
    return {str(one): (one.lstat().st_size, one.lstat().st_mtime_ns) for one in found}


@pytest.mark.parametrize("label", PROGRAMS)
def test_folders_of_programs(
    label: str, tiny: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PROGRAMS[label](tmp_path / label, tiny)
    before = everything_below(tmp_path, root)
    program, right = RIGHT[label]
    assert read(folder).label == program
    with monkeypatch.context() as patch:
        if label != "A1111":
            patch.setattr(manifest, "hash_components", lambda *_: pytest.fail("weights were read"))
        found = bring(folder, root)
    assert {one.name: one.kind for one in found if one.state == "imported"} == right
    refused = [one.note for one in found if one.state == "refused"]
    assert len(refused) == {"A1111": 1, "InvokeAI": 1}.get(label, 0), refused
    assert everything_below(tmp_path, root) == before
    # Once more: all is known.
    again = bring(folder, root)
    assert {one.name for one in again if one.state == "known"} == right.keys()
    assert not [one for one in again if one.state == "imported"]
    cards = [*Catalog.under(root).library.cards(), *Catalog.under(root).adapters.cards()]
    assert right.keys() <= {card.name for card in cards}
    if label in ("A1111", "InvokeAI", "SwarmUI"):
        [words] = [card.summary["trigger_words"] for card in cards if card.kind == "lora" and card.name in right]
        assert words == list(WORDS)


def test_a_model_is_read_when_it_is_used(tiny: Path, root: Path, tmp_path: Path) -> None:
    bring(other_programs.a1111(tmp_path / "webui", tiny), root)
    engine = safelight.open_engine(root)
    asked = safelight.Request("an apple <lora:glow.style:0.5>", "国风v3", steps=1, width=64, height=64)
    made = next(engine.generate(asked))
    plain = safelight.Request("an apple", str(tiny / "a.safetensors"), steps=1, width=64, height=64)
    right = next(engine.generate(plain))
    assert made.model_digest == right.model_digest
    assert made.pixels_sha256 != right.pixels_sha256
    catalog = Catalog.under(root)
    assert {one.name for one in catalog.library.unread.all()} == {"My Style v2", "nice.vae"}
    [card] = [card for card in catalog.library.cards() if card.name == "国风v3"]
    assert (card.digest, card.state()) == (right.model_digest, "there")
    lora = catalog.adapters.get("glow.style")
    assert lora.trigger_words == WORDS
    assert catalog.adapters.verify(lora).trigger_words == WORDS
    assert catalog.library.get("My Style v2").path.name == "My Style v2.safetensors"


def test_the_program_of_words_that_no_file_says(tiny: Path, root: Path, tmp_path: Path) -> None:
    bring(other_programs.invoke(tmp_path / "invoke", tiny), root)
    assert Catalog.under(root).adapters.get("Glow").trigger_words == WORDS
    # They are there after another process has read the record.
    assert Catalog.under(root).adapters.get("Glow").trigger_words == WORDS


def test_defaults_of_another_program(tiny: Path, root: Path, tmp_path: Path) -> None:
    """They count from the first image on, also after the file was read again. What is left out is named."""
    found = {one.name: one.note for one in bring(other_programs.invoke(tmp_path / "invoke", tiny), root)}
    note = "these of its defaults are not taken over: cfg_rescale_multiplier 0.7, guidance 3.5"
    assert (found["Dreamy XL"], found["Dreamy XL (4567)"]) == (note, "")
    own = {"width": 72, "height": 64, "steps": 3, "cfg": 4.5, "sampler": "dpmpp_2m", "schedule": "karras"}
    catalog = Catalog.under(root)
    [card] = [card for card in catalog.library.cards() if card.name == "Dreamy XL"]
    assert card.summary["defaults"] == own | {"vae": "Fine VAE"}
    job = resolve(safelight.Request("an apple", "Dreamy XL"), catalog)
    assert {name: getattr(job.request, name) for name in own} == own
    assert (job.request.vae, [part.role for part in job.parts]) == ("Fine VAE", ["vae"])
    assert catalog.library.verify("Dreamy XL").defaults == own | {"vae": "Fine VAE"}
    engine = safelight.open_engine(root)
    asked = safelight.Request("an apple", "Dreamy XL", steps=1, cfg=1.0)
    made = next(engine.generate(asked))
    request = made.metadata["request"]
    assert (made.width, made.height, request["steps"], request["sampler"]) == (72, 64, 1, "dpmpp_2m")
    catalog.adapters.remove("Fine VAE")
    with pytest.raises(RequestError, match="is the default of Dreamy XL and not in the library; add it, or run"):
        resolve(safelight.Request("an apple", "Dreamy XL"), catalog)
    assert set_defaults(catalog.library, "Dreamy XL", {"steps": 5}) == {"steps": 5}
    job = resolve(safelight.Request("an apple", "Dreamy XL"), Catalog.under(root))
    assert (job.request.steps, job.request.sampler, job.request.vae) == (5, "euler", "")


def test_defaults_of_a_file_beside_a_checkpoint(tiny: Path, root: Path, tmp_path: Path) -> None:
    folder = other_programs.a1111(tmp_path / "webui", tiny)
    path = next(folder.rglob("国风v3.safetensors"))
    path.with_suffix(".json").write_text(json.dumps({"vae": "nice.vae.safetensors", "notes": "x"}))
    bring(folder, root)
    library = Catalog.under(root).library
    assert {card.name: card.summary["defaults"] for card in library.cards() if card.summary["defaults"]} == {
        "国风v3": {"vae": "nice.vae"}
    }


def test_names_are_changed_and_forgotten_before_a_file_is_read(tiny: Path, root: Path, tmp_path: Path) -> None:
    bring(other_programs.a1111(tmp_path / "webui", tiny), root)
    catalog = Catalog.under(root)
    with pytest.raises(InputError, match="is taken"):
        catalog.library.rename("国风v3", "My Style v2")
    catalog.library.rename("国风v3", "guofeng")
    catalog.adapters.rename("glow.style", "glow")
    assert catalog.adapters.get("glow").kind == "lora"
    catalog.library.remove("My Style v2")
    catalog.adapters.remove("nice.vae")
    assert [one.name for one in catalog.library.unread.all()] == ["guofeng"]
    with pytest.raises(ModelNotFoundError):
        catalog.library.get("My Style v2")
    assert (tmp_path / "webui/models/Stable-diffusion/sub folder/My Style v2.safetensors").exists()


def test_a_file_that_went_or_changed_is_said(tiny: Path, root: Path, tmp_path: Path) -> None:
    folder = other_programs.swarm(tmp_path / "swarm", tiny)
    bring(folder, root)
    catalog, path = Catalog.under(root), folder / "Models/Stable-Diffusion/OfficialSD/a.safetensors"
    os.utime(path, ns=(1, 1))
    [card] = [card for card in catalog.library.cards() if card.path == path]
    assert card.state() == "changed"
    [one] = [one for one in bring(folder, root) if one.kind == "checkpoint"]
    assert (one.state, one.name) == ("imported", "a")
    [card] = [card for card in catalog.library.cards() if card.path == path]
    assert card.state() == "there"
    path.unlink()
    assert card.state() == "gone"
    with pytest.raises(InputError, match="does not exist"):
        catalog.library.get("a")


def test_an_imported_vae_completes_a_model(tiny: Path, root: Path, tmp_path: Path) -> None:
    """Z-Image's denoiser has no text encoder and no VAE. Imported ones that fit are read then, and nothing else."""
    from support.families import tiny_families

    row = tiny_families()["z-image"]
    files = row.write_files(tmp_path / "models", 5)
    [before] = [one for one in bring(tmp_path / "models", root) if one.path == files[row.family.denoiser]]
    assert "--variant" in before.note
    with pytest.raises(InputError, match="which variant"):
        Catalog.under(root).library.get(before.name)
    # A second import says it.
    imported = bring(tmp_path / "models", root, row.variant)
    assert {one.state for one in imported if one.path == files[row.family.denoiser]} == {"imported"}
    catalog = Catalog.under(root)
    name = next(one.name for one in imported if one.path == files[row.family.denoiser])
    model = catalog.library.get(name)
    assert set(model.sources) == {role for role in row.roles if role != row.family.denoiser}
    assert {one.format for one in catalog.library.unread.all()} == {"diffusers"}


def test_paths_that_are_no_folders_of_programs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        read(tmp_path / "absent")
    (tmp_path / "databases").mkdir()
    (tmp_path / "databases/invokeai.db").write_bytes(b"words")
    with pytest.raises(CorruptFileError, match="InvokeAI 4 and later"):
        read(tmp_path)
    (tmp_path / "paths.yaml").write_text("a: [")
    for text in ("a: [", "a: 2024-13-45", "[" * 3000):
        (tmp_path / "paths.yaml").write_text(text)
        with pytest.raises(CorruptFileError, match="is no YAML"):
            read(tmp_path / "paths.yaml")
    (tmp_path / "paths.yaml").write_text("a:\n  base_path: ~nobody-here/x\n  loras: y\n")
    with pytest.raises(InputError, match="nobody-here"):
        read(tmp_path / "paths.yaml")
    with pytest.raises(InputError, match="nobody-here"):
        read(Path("~nobody-here/x"))


def names_in(root: Path) -> dict[str, Path]:
    catalog = Catalog.under(root)
    cards = [*catalog.library.cards(), *catalog.adapters.cards()]
    return {card.name: card.path for card in cards if card.summary["origin"] != "starter"}


def test_linked_folders_are_followed_once(tiny: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    other_programs.put(tiny / "a.safetensors", tmp_path / "drive/a.safetensors")
    comfy = tmp_path / "ComfyUI"
    (comfy / "models").mkdir(parents=True)
    (comfy / "custom_nodes").mkdir()
    (comfy / "models/checkpoints").symlink_to(tmp_path / "drive")
    (tmp_path / "drive/round").symlink_to(comfy / "models")
    (tmp_path / "drive/itself.safetensors").symlink_to(tmp_path / "drive/itself.safetensors")
    found = bring(comfy, root)
    assert [(one.name, one.state) for one in found if one.state == "imported"] == [("a", "imported")]
    assert [one.path.name for one in found if one.state == "refused"] == ["itself.safetensors"]


def test_names_that_are_no_unicode(tiny: Path, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xb9\xfa.safetensors"))
    other_programs.put(tiny / "a.safetensors", odd)
    other_programs.put(tiny / "b.safetensors", folder / "good.safetensors")
    assert {one.state for one in bring(folder, root)} == {"imported"}
    assert names_in(root).keys() == {"good", "model"}
    assert Catalog.under(root).library.get("good").name == "good"
    assert names_in(root).keys() == {"good", "model"}


def test_two_imports_at_once_choose_different_names(tiny: Path, root: Path, tmp_path: Path) -> None:
    for name in ("p", "q"):
        other_programs.put(tiny / "a.safetensors", tmp_path / name / "x.safetensors")
    batches = [importing._Importer(Catalog.under(root), lambda _: "") for _ in range(2)]
    for name, batch in zip("pq", batches, strict=True):
        batch.import_batch(read(tmp_path / name).candidates)
    assert names_in(root).keys() == {"x", "x (q)"}


def test_a_folder_that_moved_keeps_its_names(tiny: Path, root: Path, tmp_path: Path) -> None:
    other_programs.put(tiny / "a.safetensors", tmp_path / "old/x.safetensors")
    bring(tmp_path / "old", root)
    Catalog.under(root).library.rename("x", "pretty")
    (tmp_path / "old").rename(tmp_path / "new")
    bring(tmp_path / "new", root)
    assert names_in(root) == {"pretty": tmp_path / "new/x.safetensors"}


def test_two_files_that_moved_do_not_get_one_name(tiny: Path, root: Path, tmp_path: Path) -> None:
    """They have the same size and time, as a copy has."""
    old = tmp_path / "old"
    for name in ("x", "y"):
        path = other_programs.put(tiny / "a.safetensors", old / f"{name}.safetensors")
        os.utime(path, ns=(5, 5))
    bring(old, root)
    old.rename(tmp_path / "new")
    bring(tmp_path / "new", root)
    assert set(names_in(root).values()) == {tmp_path / "new/x.safetensors", tmp_path / "new/y.safetensors"}


def test_what_a_program_calls_otherwise_is_not_read_to_say_so(tiny: Path, root: Path, tmp_path: Path) -> None:
    other_programs.put(tiny / "a.safetensors", tmp_path / "models/x.safetensors")
    adapters.write(tmp_path / "models/l.safetensors")
    bring(tmp_path / "models", root)
    catalog = Catalog.under(root)
    for shelf, name in ((catalog.library, "x"), (catalog.adapters, "l")):
        assert shelf.rename(name, f"pretty {name}").digest == ""
        with pytest.raises(InputError, match=f"use its name, 'pretty {name}'"):
            shelf.remove(name)
        with pytest.raises(InputError, match=f"use its name, 'pretty {name}'"):
            shelf.rename(name, "other")
    assert len(catalog.library.unread.all()) == 2
    # Its file's name finds it.
    assert catalog.library.get("x").name == "pretty x"
    assert catalog.adapters.get("l").name == "pretty l"


@pytest.mark.parametrize("change", ["rename", "remove"])
def test_a_file_that_is_renamed_or_removed_while_it_is_read(
    change: str, tiny: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_programs.put(tiny / "a.safetensors", tmp_path / "models/x.safetensors")
    bring(tmp_path / "models", root)
    real = library.read_model

    def change_then_read(*given: Any) -> Any:
        other = Catalog.under(root).library
        other.rename("x", "y") if change == "rename" else other.remove("x")
        return real(*given)

    monkeypatch.setattr(library, "read_model", change_then_read)
    if change == "rename":
        assert Catalog.under(root).library.get("x").name == "y"
        assert names_in(root).keys() == {"y"}
    else:
        with pytest.raises(ModelNotFoundError):
            Catalog.under(root).library.get("x")
        assert names_in(root) == {}


def test_a_file_is_read_once_by_many_threads(
    tiny: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_programs.put(tiny / "a.safetensors", tmp_path / "models/x.safetensors")
    bring(tmp_path / "models", root)
    shared, real, calls = Catalog.under(root).library, library.read_model, list[int]()

    def counted(*given: Any) -> Any:
        calls.append(1)
        time.sleep(0.2)
        return real(*given)

    monkeypatch.setattr(library, "read_model", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shared.get, ["x"] * 4))
    assert len({model.digest for model in found}) == len(calls) == 1


def test_choices_for_a_model_that_was_not_read(tiny: Path, root: Path, tmp_path: Path) -> None:
    for name in "ab":
        other_programs.put(tiny / f"{name}.safetensors", tmp_path / f"models/{name}.safetensors")
    bring(tmp_path / "models", root)
    shelf = Catalog.under(root).library
    with pytest.raises(InputError, match="read it with `safelight models add"):
        shelf.set_choices("a", parts=[(Purpose.VAE, "b")])
    shelf.get("b")
    assert shelf.set_choices("a", parts=[(Purpose.VAE, "b")]).sources == {"vae": "b"}


def test_a_damaged_list_is_said(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "unread.json").write_text("[{}]")
    with pytest.raises(CorruptFileError, match="import the folders again"):
        Catalog.under(root).library.cards()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (".civitai.info", {"trainedWords": ["glow, neon light", "glow"]}),
        (".json", {"activation text": "glow, neon light"}),
        (".metadata.json", {"civitai": {"trainedWords": ["glow", "neon light"]}}),
        (".cm-info.json", {"TrainedWords": ["glow", "neon light"]}),
        (".swarm.json", {"modelspec.trigger_phrase": "glow,neon light"}),
    ],
)
def test_words_that_call_a_lora(ending: str, said: object, root: Path, tmp_path: Path) -> None:
    path = adapters.write(tmp_path / "one.safetensors")
    (tmp_path / f"one{ending}").write_text(json.dumps(said))
    added = Catalog.under(root).adapters.add(tmp_path / "one.safetensors")
    assert added.trigger_words == WORDS, path


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", '{"trainedWords": 3}', '{"trainedWords": [null, "\\u0000"]}', "[" * 9999]
)
def test_odd_files_beside_a_lora_are_no_error(text: str, root: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "one.safetensors")
    (tmp_path / "one.civitai.info").write_text(text)
    words = Catalog.under(root).adapters.add(tmp_path / "one.safetensors").trigger_words
    assert words in ((), ("None",))
