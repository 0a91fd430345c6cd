"""`safelight import` takes over the models of another program."""

from __future__ import annotations

from pathlib import Path

from support import other_programs


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
