"""`safelight import` takes over the models of another program."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from support import foreign_pictures, other_programs


def test_a_folder_of_comfyui(run, tiny: Path, tmp_path: Path) -> None:
    folder = other_programs.comfy(tmp_path / "ComfyUI", tiny)
    done = run("import", folder)
    assert done.code == 0
    assert "(ComfyUI): 3 files" in done.out
    assert "read and hashed when they are used for the first time" in done.out
    assert "not read yet" in run("models", "list").out
    assert "not read yet" in run("adapters", "list").out
    assert "there already" in run("import", folder).out
    [a, other, one] = sorted(run("import", folder, "--json").rows, key=lambda row: row["name"])
    assert (a["state"], a["kind"], a["program"]) == ("known", "checkpoint", "ComfyUI")
    assert (other["name"], one["base"]) == ("a (more)", "sd1")
    shown = run("models", "show", "a (more)", "--json").rows[0]
    assert (shown["origin"], len(shown["digest"])) == ("added", 64)


def test_what_a_folder_lacks_is_said(run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/page.safetensors").write_text("<!DOCTYPE html>")
    done = run("import", tmp_path / "empty")
    assert done.code == 2
    assert "is a web page saved under this name" in done.out
    assert "has no model that Safelight can use" in done.err
    assert run("import", tmp_path / "absent").code == 2


def test_defaults_of_a_model(run, tiny: Path) -> None:
    run("models", "add", tiny / "a.safetensors", "--name", "a")
    assert "its family's count" in run("models", "defaults", "a").out
    [row] = run("models", "defaults", "a", "steps=3", "sampler=DPM++ 2M Karras", "width=64", "--json").rows
    own = {"width": 64, "steps": 3, "sampler": "dpmpp_2m", "schedule": "karras"}
    assert row["defaults"] == own

    def drawn(*more: str) -> dict[str, Any]:
        path = run("generate", "x", "--model", "a", "--height", "64", *more, "--json").rows[-1]["path"]
        with PILImage.open(path) as picture:
            return json.loads(picture.info["safelight"])["request"]

    request = drawn()
    assert {name: request[name] for name in own} == own
    request = drawn("--sampler", "euler", "--steps", "1")
    assert (request["sampler"], request["schedule"], request["steps"]) == ("euler", "default", 1)
    [row] = run("models", "defaults", "a", "steps=", "sampler=euler", "--json").rows
    assert row["defaults"] == {"width": 64, "sampler": "euler"}
    refused = run("models", "defaults", "a", "seed=3")
    assert (refused.code, "seed" in refused.err) == (2, True)
    assert run("models", "defaults", "a", "steps").code == 2
    assert run("models", "defaults", "starter-noto", "steps=3").code == 2


def test_hashes_of_files(run, tiny: Path) -> None:
    run("models", "add", tiny / "a.safetensors", "--name", "a")
    [row] = run("models", "hashes", "a", "--json").rows
    assert row["sha256"] == hashlib.sha256((tiny / "a.safetensors").read_bytes()).hexdigest()
    assert row["sha256"] in run("models", "hashes").out
    assert run("models", "hashes", "nobody").code == 2


def test_pictures_of_another_program_come_into_the_gallery(run, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(foreign_pictures.PICTURES["ComfyUI"]())
    PILImage.new("RGB", (4, 4)).save(folder / "photo.png")
    done = run("gallery", "import", folder)
    assert done.code == 0
    assert f"{folder}: 3 pictures" in done.out
    assert "--all adds them, too" in done.out
    rows = run("gallery", "import", folder, "--all", "--json").rows
    assert [(Path(row["path"]).name, row["state"]) for row in rows] == [
        ("0.png", "known"),
        ("1.png", "known"),
        ("photo.png", "imported"),
    ]
    (tmp_path / "empty").mkdir()
    refused = run("gallery", "import", tmp_path / "empty")
    assert (refused.code, "has no picture" in refused.err) == (2, True)
