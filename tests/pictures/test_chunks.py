"""What image files carry, and that it is read back or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as PILImage
from PIL import PngImagePlugin

from safelight import save
from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.pictures import chunks
from safelight.workers.local_engine import LocalEngine


def test_both_chunks(engine: LocalEngine, ask, tmp_path: Path) -> None:
    image = next(engine.generate(ask(seed=3, negative="blue, “quoted”", schedule="karras")))
    path = save(image, tmp_path / "images")
    with PILImage.open(path) as opened:
        assert opened.convert("RGB").tobytes() == image.pixels
        text = opened.info["parameters"]
    assert text.splitlines()[:2] == ["red apple", "Negative prompt: blue, “quoted”"]
    line = text.splitlines()[2]
    assert line.startswith("Steps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 7.0, Seed: 3, Size: 64x64, ")
    assert f"Model hash: {image.model_digest[:10]}, Model: a" in line
    metadata, pixels = chunks.read(path)
    assert metadata == json.loads(json.dumps(image.metadata))
    assert pixels == image.pixels_sha256


def test_a1111_counts_clip_skip_one_higher(engine: LocalEngine, ask) -> None:
    image = next(engine.generate(ask(clip_skip=1)))
    assert "Clip skip: 2" in chunks.parameters(image.metadata)


def test_files_are_never_written_over(engine: LocalEngine, ask, tmp_path: Path) -> None:
    image = next(engine.generate(ask(seed=3)))
    names = [save(image, tmp_path).name for _ in range(3)]
    assert names == ["a-3.png", "a-3-2.png", "a-3-3.png"]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(names)
    assert not list(tmp_path.glob(".safelight-*"))


def test_a_folder_that_cannot_be_written(engine: LocalEngine, ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreadableFileError, match="is a file, not a folder"):
        save(next(engine.generate(ask())), tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no safelight metadata"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"version": 1}), "damaged"),
        (
            json.dumps(
                {"version": 99, "request": {"a": 1}, "model": {"digest": "x"}, "run": {"a": 1}, "pixels_sha256": "x"}
            ),
            "newer Safelight",
        ),
        (
            json.dumps(
                {
                    "version": "1",
                    "request": {"model": "m", "width": 8},
                    "model": {"digest": "x"},
                    "run": {"device": "cpu", "dtype": "fp32", "attention": "torch-sdp", "threads": 1, "versions": {}},
                    "pixels_sha256": "x",
                }
            ),
            "damaged",
        ),
    ],
)
def test_other_images_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt("safelight", text)
    PILImage.new("RGB", (8, 8)).save(tmp_path / "i.png", pnginfo=info)
    with pytest.raises((CorruptFileError, UnreadableFileError), match=message):
        chunks.read(tmp_path / "i.png")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(b"hello")
    with pytest.raises(CorruptFileError, match="not a readable image"):
        chunks.read(tmp_path / "i.png")


def test_images_are_values(engine: LocalEngine, ask) -> None:
    image = next(engine.generate(ask()))
    assert replace(image, path=Path("x")).pixels is image.pixels
