"""`safelight show` says how a picture was made."""

from __future__ import annotations

from pathlib import Path

from support.foreign_pictures import PICTURES, PROMPT, png


def test_a_picture_of_another_program(run, tmp_path: Path) -> None:
    path = tmp_path / "some.png"
    path.write_bytes(PICTURES["ComfyUI"]())
    shown = run("show", path)
    assert shown.code == 0
    for part in ("ComfyUI", "one 0.8, two -0.5", "512x640", "dpmpp_2m", "dream v8"):
        assert part in shown.out
    [row] = run("show", path, "--json").rows
    assert (row["prompt"], row["seed"]) == (PROMPT, 42)


def test_a_picture_that_says_nothing_and_a_file_that_is_none(run, tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    path.write_bytes(png())
    silent = run("show", path)
    assert (silent.code, silent.out) == (1, "")
    assert "says nothing about how it was made" in silent.err
    path.write_bytes(b"words")
    assert run("show", path).code == 2
