"""What a new user does in the first hour: names, folders, seeds, defaults, and warnings before the work starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from safetensors.torch import save_file
from support import adapters

from safelight.cli import generate
from safelight.devices import choice
from safelight.pictures import chunks
from safelight.request.samplers import parse_sampler_and_schedule

QUICK = ("--steps", "1")


def test_a_folder_is_added_with_a_line_for_each_file(run, tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    (home / "deeper").mkdir(parents=True)
    shutil.copy(tiny / "a.safetensors", home / "国风.safetensors")
    shutil.copy(tiny / "b.safetensors", home / "deeper/my style v2.safetensors")
    shutil.copytree(tiny / "folder", home / "whole")
    (home / "broken.safetensors").write_bytes(b"")
    save_file(adapters.lora("sd1", 1, adapters.kohya), home / "a lora.safetensors")
    (home / "notes.txt").write_text("no model")
    first = run("models", "add", home)
    assert first.code == 0
    lines = sorted(line.partition(":")[0] for line in first.out.splitlines())
    assert lines[0] == "added a lora"
    assert lines[1:] == ["added my style v2", "added whole (the same content as 国风)", "added 国风"] or len(lines) == 4
    assert "broken.safetensors: is empty" in first.err
    assert "added a lora: lora for sd1, fp32" in first.out
    assert "notes" not in first.out + first.err
    again = run("models", "add", home)
    assert again.out.count("is already in the library") == 4
    found = run("adapters", "add", home)
    assert (found.code, "a lora is already in the library" in found.out) == (0, True)
    assert run("models", "add", home / "broken.safetensors").code == 2


def test_names_of_every_script_are_used(run, tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "a.safetensors", tmp_path / "麦橘写实 v7.safetensors")
    assert run("models", "add", tmp_path / "麦橘写实 v7.safetensors").code == 0
    size = ("--width", "64", "--height", "64")
    by_name = run("generate", "x", "-m", "麦橘写实 v7", "--seed", "3", "--json", "--out", tmp_path / "o", *QUICK, *size)
    by_path = run(
        "generate", "x", "-m", tmp_path / "麦橘写实 v7.safetensors", "--seed", "3", "--json", "--out", tmp_path / "o",
        *QUICK, *size,
    )  # fmt: skip
    assert [Path(row["path"]).name for row in (*by_name.rows, *by_path.rows)] == [
        "麦橘写实-v7-3.png",
        "麦橘写实-v7-3-2.png",
    ]
    assert by_name.rows[0]["pixels_sha256"] == by_path.rows[0]["pixels_sha256"]


def test_old_prompts_find_loras_by_their_files_names(run, tmp_path: Path) -> None:
    for file in ("my style v2", "look, soft"):
        adapters.for_starter(tmp_path / f"{file}.safetensors")
        assert run("adapters", "add", tmp_path / f"{file}.safetensors").code == 0
    for name in ("my style v2", "look soft", "look, soft"):
        prompt = f"apple <lora:{name}:0.8>"
        outcome = run("generate", prompt, "-m", "starter-noto", "--out", tmp_path / "o", *QUICK)
        assert outcome.code == 0, outcome.err


def test_an_adapter_by_its_path_leaves_no_path_in_the_image_and_is_remade(run, tmp_path: Path) -> None:
    private = tmp_path / "private place"
    private.mkdir()
    path = adapters.for_starter(private / "ink, soft: v1.safetensors")
    made = run("generate", "apple", "-m", "starter-noto", "--lora", f"{path.parent}/ink, soft", "--json", *QUICK)
    assert made.code == 2
    shutil.copy(path, private / "mine.safetensors")
    options = ("--lora", f"{private / 'mine.safetensors'}:0.7", "--out", tmp_path / "o")
    made = run("generate", "apple", "-m", "starter-noto", "--json", *options, *QUICK)
    assert made.code == 0, made.err
    picture = Path(made.rows[0]["path"])
    assert b"private place" not in picture.read_bytes()
    metadata, _ = chunks.read(picture)
    assert metadata["request"]["loras"][0]["name"] == "mine"
    assert run("remake", picture).code == 0


def test_no_seed_is_a_random_one_for_the_whole_command(run, tmp_path: Path) -> None:
    models = ("-m", "starter-noto", "-m", "starter-fluent", "-m", "starter-noto")
    seen = set()
    for more in ((), ("--seed", "-1"), ("--seed", "random")):
        rows = run("generate", "red apple", *models, "--json", "--out", tmp_path, *QUICK, *more).rows
        assert len({row["seed"] for row in rows}) == 1
        assert rows[0]["pixels_sha256"] == rows[2]["pixels_sha256"]
        seen.add(rows[0]["seed"])
    assert len(seen) == 3
    said = run("generate", "red apple", "-m", "starter-noto", "--out", tmp_path, *QUICK).out
    assert "seed" in said


def test_the_default_model_is_used_where_none_is_named(run, tmp_path: Path) -> None:
    assert run("config", "set", "default_model", "starter-fluent").code == 0
    (row,) = run("generate", "red apple", "--json", "--out", tmp_path, *QUICK).rows
    assert row["model"] == "starter-fluent"
    assert "starter-fluent (default)" in run("models", "list").out


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (("DPM++ 2M Karras", "default"), ("dpmpp_2m", "karras")),
        (("dpm++ 2m sde exponential", "default"), ("dpmpp_2m_sde", "exponential")),
        (("Euler-A", "default"), ("euler_a", "default")),
        (("Euler a", "SGM Uniform"), ("euler_a", "sgm_uniform")),
        (("PLMS", "default"), ("pndm", "default")),
    ],
)
def test_samplers_by_any_name(written: tuple[str, str], meant: tuple[str, str]) -> None:
    assert parse_sampler_and_schedule(*written) == meant


def test_everyday_words_work(run, tmp_path: Path) -> None:
    options = ("-n", "2", "--sampler", "DPM++ 2M Karras", "--json", "--out", tmp_path, *QUICK)
    assert len(run("generate", "red apple", "-m", "starter-noto", *options).rows) == 2
    assert run("version").out.startswith("safelight 0.")
    assert "Add checkpoints" in run("help", "models", "add").out
    assert "rename" in run("help", "models").out
    for word, never in (("remov", "remove"), ("rollbac", "rollback")):
        outcome = run("models", word, "x")
        assert (outcome.code, never in outcome.err) == (2, False)
    assert "'rename'" in run("models", "renam", "x").err
    assert "did you mean" not in run("generate", "x <lora:nope:1>", "-m", "starter-noto").err.lower()


def test_what_is_far_from_the_trained_size_is_said_beforehand(run, tmp_path: Path) -> None:
    far = run("generate", "x", "-m", "starter-noto", "--width", "512", "--out", tmp_path, *QUICK)
    assert "was trained at 64x64: at 512x64 expect repeated shapes" in far.err
    near = run("generate", "x", "-m", "starter-noto", "--width", "96", "--out", tmp_path, *QUICK)
    assert "trained" not in near.err


def test_how_long_it_takes_is_said_once_it_is_over_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(generate.time, "monotonic", lambda: now[0])
    slow, quick = generate.Pace(100), generate.Pace(100)
    said = []
    for step in range(1, 5):
        now[0] += 7
        said.append(slow.at(step))
    assert said == ["", "about 11 minutes left for 98 steps", "", ""]
    now[0] = 0
    for step in range(1, 5):
        now[0] += 0.1
        assert quick.at(step) == ""


def test_slow_precisions_are_said(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(choice, "native_bf16", lambda native=native: native)
        outcome = run("generate", "x", "-m", "starter-noto", "--precision", "bf16", "--out", tmp_path, *QUICK)
        assert ("no bf16 instructions" in outcome.err) is not native
        assert ("no bf16 instructions" in run("fits", "starter-noto", "--precision", "bf16").out) is not native
        assert choice.precision("auto", choice.device("cpu")) == "fp32"


def test_sheets_are_never_written_over(run, tmp_path: Path) -> None:
    both = ("-m", "starter-noto", "-m", "starter-fluent")
    for _ in range(2):
        assert run("generate", "x", *both, "--out", tmp_path / "o", *QUICK).code == 0
    assert {path.name for path in (tmp_path / "o").glob("sheet*")} == {"sheet.png", "sheet-2.png"}


def test_unclosed_brackets_are_drawn_with_a_note(run, tmp_path: Path) -> None:
    outcome = run("generate", "(red apple", "-m", "starter-noto", "--seed", "1", "--out", tmp_path, *QUICK)
    assert outcome.code == 0
    assert "prompt: the ( at character 0 is never closed: it extends to the end" in outcome.err
    closed = run("generate", "(red apple)", "-m", "starter-noto", "--seed", "1", "--json", "--out", tmp_path, *QUICK)
    with PILImage.open(closed.rows[0]["path"]) as one, PILImage.open(tmp_path / "starter-noto-1.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--variation-seed", "5"), "variation_seed='5'|variation_seed=5"),
        (("--hires-steps", "8"), "without --hires-scale"),
        (("--hires-strength", "0.3"), "without --hires-scale"),
        (("--hires-upscaler", "lanczos"), "without --hires-scale"),
        (("--every",), "has no choices"),
        (("--api-key", "secret"), "without --server"),
        (("--mask-blur", "3"), "without --mask"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    outcome = run("generate", "x", "-m", "starter-noto", "--out", tmp_path / "o", *QUICK, *options)
    assert outcome.code == 2
    assert re.search(says, outcome.err)
    assert "secret" not in outcome.err
    beside = run("--device", "cpu", "generate", "x", "-m", "starter-noto", "--server", "http://127.0.0.1:9", *QUICK)
    assert (beside.code, "remove --device" in beside.err) == (2, True)


def test_a_setting_can_be_unset(run) -> None:
    assert run("config", "set", "default_seed", "5").code == 0
    assert "default_seed is now none (from default)" in run("config", "unset", "default_seed").out.replace("\n", " ")
    again = run("config", "unset", "default_seed")
    assert (again.code, "is not set there" in again.err) == (2, True)
    assert "unknown setting; did you mean default_seed?" in run("config", "unset", "default_sed").err


def test_a_picture_says_how_it_was_made(run, tmp_path: Path) -> None:
    (row,) = run("generate", "red apple", "-m", "starter-noto", "--json", "--out", tmp_path, *QUICK).rows
    said = run("png-info", row["path"])
    assert said.code == 0
    assert said.out.startswith("red apple\n")
    assert "Steps:" in said.out
    (found,) = run("png-info", row["path"], "--json").rows
    assert found["parameters"]["Seed"] == row["seed"] or str(found["parameters"]["Seed"]) == str(row["seed"])
    PILImage.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert run("png-info", tmp_path / "plain.png").code == 1
    (tmp_path / "text.png").write_text("no picture")
    assert run("png-info", tmp_path / "text.png").code == 2
    assert run("remake", row["path"], "--out", tmp_path / "x.png").code == 2


def test_formats_and_names_of_files(run, tmp_path: Path) -> None:
    ask = ("generate", "red apple", "-m", "starter-noto", "--steps", "1", "--seed", "3", "--out", tmp_path / "out")
    [row] = run(*ask, "--image-format", "jpeg", "--image-names", "{seed}/{prompt}", "--json").rows
    path = Path(row["path"])
    assert path == tmp_path / "out/3/red-apple.jpg"
    done = run("remake", path, "--out", tmp_path / "again")
    assert (done.code, "the recorded one, pixel for pixel" in done.out) == (0, True)
    assert "red apple" in run("show", path).out
    refused = run(*ask, "--image-names", "{sead}")
    assert (refused.code, "image_names" in refused.err, "{sead}" in refused.err) == (2, True, True)
    assert run(*ask, "--image-format", "gif").code == 2


def test_a_default_vae_changes_no_remake(run, tiny: Path, tmp_path: Path) -> None:
    """An image that was made before the model got it has the model's own."""
    run("models", "add", tiny / "a.safetensors", "--name", "a")
    run("models", "add", tiny / "b.safetensors", "--name", "b")
    ask = ("generate", "x", "-m", "a", "--steps", "1", "--width", 64, "--height", 64, "--seed", 7, "--out", tmp_path)
    [row] = run(*ask, "--json").rows
    assert run("models", "defaults", "a", "vae=b").code == 0
    assert "the same, pixel for pixel" in run("remake", row["path"]).out
    [other] = run(*ask, "--json").rows
    [own] = run(*ask, "--vae", "own", "--json").rows
    assert other["pixels_sha256"] != row["pixels_sha256"] == own["pixels_sha256"]
    refused = run("models", "defaults", "a", "sampler=euler_a", "schedule=karras")
    assert (refused.code, "has default, sgm_uniform" in refused.err) == (2, True)
