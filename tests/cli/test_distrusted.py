"""``safelight doctor --image`` finds out what is wrong with a distrusted image."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from support import adapters

SMALL = ("--steps", "2", "--width", "64", "--height", "64")


def rewritten(path: str, change: Callable[[dict[str, Any]], None], spoil: bool = True, keep: bool = False) -> str:
    """Save a copy with changed metadata. Returns its path.

    ``spoil``: replace the pixels by noise. ``keep``: leave the recorded hash of the pixels, as if the file was edited
    later; otherwise the hash is that of the noise.
    """
    with PILImage.open(path) as opened:
        opened.load()
        texts = dict(opened.text)  # type: ignore[attr-defined]
        pixels = np.asarray(opened.convert("RGB"))
    metadata = json.loads(texts["safelight"])
    if spoil:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    if spoil and not keep:
        metadata["pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
    change(metadata)
    info = PngInfo()
    for name, text in (texts | {"safelight": json.dumps(metadata)}).items():
        info.add_text(name, text)
    changed = Path(path).with_name("distrusted.png")
    PILImage.fromarray(pixels).save(changed, pnginfo=info)
    return str(changed)


@pytest.fixture
def picture(run, tiny: Path, tmp_path: Path) -> str:
    shutil.copy(tiny / "a.safetensors", tmp_path / "mine.safetensors")
    adapters.write(tmp_path / "style.safetensors")
    assert run("models", "add", tmp_path / "mine.safetensors").code == 0
    assert run("adapters", "add", tmp_path / "style.safetensors").code == 0
    asked = ("generate", "x <lora:style:0.5>", "-m", "mine", "--json", "--out", tmp_path / "out", *SMALL)
    return run(*asked).rows[0]["path"]


def nothing(_: dict[str, Any]) -> None: ...


def another_version(metadata: dict[str, Any]) -> None:
    metadata["run"]["versions"]["torch"] = "1.0"


def another_device(metadata: dict[str, Any]) -> None:
    metadata["run"]["hardware"] = "another processor"


def other_numbers(metadata: dict[str, Any]) -> None:
    metadata["numerics"]["threads"] = "17"


CASES = {
    "edited": (nothing, True, "loading", "edited, converted or damaged", "Look for the original"),
    "spoiled": (
        nothing,
        False,
        "state",
        "something outside of its request spoiled the picture",
        "Keep the picture made again",
    ),
    "another version": (another_version, False, "device", "torch: 1.0, now", "safelight rollback"),
    "another device": (another_device, False, "device", "hardware: another processor, now", "the one that made it"),
    "other numbers": (other_numbers, False, "device", "threads: 17, now", "The numeric state was different"),
}


def examined(run, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    outcome = run("doctor", "--image", path, "--json")
    assert outcome.code == 1, outcome.err
    return outcome.rows[0], [finding for finding in outcome.rows[0]["findings"] if not finding["ok"]]


def test_a_right_picture_is_right(run, picture: str) -> None:
    outcome = run("doctor", "--image", picture)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "the same, pixel for pixel" in outcome.out
    assert "this image is right" in outcome.out


@pytest.mark.parametrize("case", CASES)
def test_the_suspect_is_named(run, picture: str, case: str) -> None:
    change, keep, suspect, evidence, todo = CASES[case]
    report, wrong = examined(run, rewritten(picture, change, keep=keep))
    assert report["cause"] == suspect
    assert len(wrong) == 1
    assert evidence in wrong[0]["evidence"]
    assert todo in wrong[0]["todo"]


def test_a_changed_file_is_named(run, picture: str, tmp_path: Path) -> None:
    data = bytearray((tmp_path / "mine.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "mine.safetensors").write_bytes(data)
    report, wrong = examined(run, picture)
    assert report["cause"] == "loading"
    assert wrong[0]["what"] == "its model"
    assert "mine" in wrong[0]["evidence"]


def test_a_changed_adapter_is_named(run, picture: str, tmp_path: Path) -> None:
    adapters.write(tmp_path / "style.safetensors", seed=9)
    report, (wrong,) = examined(run, picture)
    assert report["cause"] == "loading"
    assert "style" in wrong["evidence"]
    assert wrong["what"] == "its adapters and input images"


def test_it_looks_at_the_picture_alone(run, picture: str) -> None:
    outcome = run("doctor", "mine", "--image", picture)
    assert outcome.code == 2
    assert "remove the models" in outcome.err
