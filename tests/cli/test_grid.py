"""``safelight grid`` saves every image and one sheet, and continues after an interruption. Also ``preprocess``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support import controls

from safelight.cli import main
from safelight.pictures import chunks
from safelight.workers.local_engine import LocalEngine

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a command as the console script does, and returns its exit code and output."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["safelight", *arguments])
        try:
            main.run()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


GRID = ("grid", "red apple", "--x", "model=starter-noto,starter-fluent", "--steps", "2", "--json")


def test_a_grid_and_its_images(run: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    code, said = run(*GRID, "--y", "prompt=red,green", "--out", str(out))
    assert code == 0, said
    cells = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(cell["column"], cell["row"]) for cell in cells] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for cell in cells:
        metadata, held = chunks.read(Path(cell["path"]))
        assert held == metadata["pixels_sha256"] == cell["pixels_sha256"]
        assert metadata["request"]["prompt"] == ("red apple", "green apple")[cell["row"]]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 2 * 256


def test_it_goes_on_where_it_was(run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run makes the interrupted image, and one whose file was changed; it does not make finished images."""
    out = tmp_path / "grid"
    flags = (*GRID, "--y", "seed=0..1", "--out", str(out))
    generate, made = LocalEngine.generate, list[str]()

    def failing(self: LocalEngine, request, *more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(request.model)
        return generate(self, request, *more)

    monkeypatch.setattr(LocalEngine, "generate", failing)
    assert run(*flags)[0] == 130
    assert len(list(out.glob("starter*.png"))) == 2
    monkeypatch.setattr(LocalEngine, "generate", generate)
    first = min(out.glob("starter*.png"))
    with Image.open(first) as image:
        image.rotate(90).save(first)
    code, said = run(*flags)
    assert code == 0, said
    kept = [json.loads(line)["kept"] for line in said.splitlines() if line.startswith("{")]
    assert sorted(kept) == [False, False, False, True]
    assert run(*flags)[1].count('"kept": true') == 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--x", "colour=red"], "must be one of model="),
        (["--x", "seed=1..2"], "choose a model with -m"),
        (["--x", "model=starter-noto,nobody"], "nobody"),
        (["-m", "starter-noto", "--x", "lora=none,edges"], "is a controlnet: ask for it as controls"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(run: Run, tmp_path: Path, flags: list[str], says: str) -> None:
    code, said = run("grid", "red apple", *flags, "--out", str(tmp_path))
    assert (code, says in said) == (2, True), said
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", ["canny", "lineart", "scribble", "softedge", "threshold", "blur", "color", "invert"])
def test_preprocessors(run: Run, tmp_path: Path, name: str) -> None:
    path = controls.picture(tmp_path / "in.png")
    code, said = run("preprocess", name, str(path), "--out", str(tmp_path / "out.png"))
    assert code == 0, said
    with Image.open(tmp_path / "out.png") as made, Image.open(path) as given:
        assert (made.size, made.mode) == (given.size, "RGB")
        assert made.tobytes() != given.convert("RGB").tobytes()
        assert len(made.getcolors(1 << 20) or []) > 1
