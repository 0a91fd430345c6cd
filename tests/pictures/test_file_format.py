"""PNG, JPEG and WebP files have the same metadata, and names that a pattern gives them."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

import safelight
from safelight.errors import RequestError
from safelight.file_patterns import check_pattern
from safelight.pictures import chunks
from safelight.pictures.file_format import ENDINGS, encode
from safelight.pictures.read_generation_data import read
from safelight.queue.image_files import FileForm, save


@pytest.fixture(scope="module")
def image(shared_engine: Any) -> safelight.Image:
    prompt = 'red apple & "leaf" \\<b\\>, 苹果 🍎'
    request = safelight.Request(prompt, "starter-noto", seed=3, steps=1, width=64, height=64, sampler="dpmpp_2m")
    return next(shared_engine.generate(request))


@pytest.mark.parametrize(("form", "quality"), [("png", 1), ("jpeg", 100), ("jpeg", 60), ("webp", 100), ("webp", 60)])
def test_each_format_holds_the_metadata(form: Any, quality: int, image: safelight.Image, tmp_path: Path) -> None:
    path = save(image, tmp_path, FileForm(form, quality))
    assert path.name == f"starter-noto-3{ENDINGS[form]}"
    metadata, held = chunks.read(path)
    lossless = form == "png" or (form, quality) == ("webp", 100)
    assert (held == image.pixels_sha256) == lossless
    assert metadata.get("encoding") == (None if lossless else f"{form}, quality {quality}")
    assert {key: value for key, value in metadata.items() if key != "encoding"} == image.metadata
    with PILImage.open(path) as opened:
        found = read(opened)
        assert opened.format == form.upper()
        text = opened.getexif().get_ifd(0x8769).get(0x9286) if form != "png" else None
    assert found is not None
    assert (found.program, found.prompt, found.seed, found.sampler) == (
        "Safelight",
        image.metadata["request"]["prompt"],
        3,
        "dpmpp_2m",
    )
    if isinstance(text, bytes):
        # What other programs read. piexif, which most of them use, needs the type UNDEFINED.
        assert b"\x86\x92\x07\x00" in path.read_bytes()
        assert text[8:].decode("utf-16-be") == chunks.parameters(image.metadata)
    near = np.abs(pixels(path.read_bytes()) - np.frombuffer(image.pixels, np.uint8).reshape(64, 64, 3))
    assert near.mean() < (1 if quality == 100 else 10)


def pixels(file: bytes) -> np.ndarray[Any, Any]:
    with PILImage.open(io.BytesIO(file)) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.int16)


def test_a_jpeg_file_with_too_much_metadata_is_refused(image: safelight.Image) -> None:
    long = replace(image, metadata={**image.metadata, "more": "x" * 70_000})
    with pytest.raises(RequestError, match="use png or webp"):
        encode(long, "jpeg")
    prompt = replace(
        image, metadata={**image.metadata, "request": {**image.metadata["request"], "prompt": "x" * 40_000}}
    )
    with pytest.raises(RequestError, match="of prompts and settings"):
        encode(prompt, "jpeg")
    for form in ("png", "webp"):
        assert hashlib.sha256(pixels(encode(long, form)).astype(np.uint8).tobytes()).hexdigest() == image.pixels_sha256


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{model}-{seed}", r"starter-noto-3\.png"),
        ("{date}/{prompt}", r"20\d\d-\d\d-\d\d/red-apple-leaf-b-苹果\.png"),
        ("{time}_{width}x{height}_{steps}_{sampler}", r"\d\d-\d\d-\d\d_64x64_1_dpmpp_2m\.png"),
        ("all", r"all\.png"),
    ],
)
def test_names(pattern: str, name: str, image: safelight.Image, tmp_path: Path) -> None:
    form = FileForm(names=check_pattern(pattern))
    path = save(image, tmp_path, form)
    assert re.fullmatch(name, str(path.relative_to(tmp_path)))
    if "time" not in pattern:
        assert save(image, tmp_path, form).stem == f"{path.stem}-2"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{modle}", "has the field {modle}; these exist: date"),
        ("{seed:05}", "has the field"),
        ("{model.__class__}", "has the field"),
        ("{model", "is no pattern"),
        ("../{seed}", "must name a file in the output folder"),
        ("/tmp/{seed}", "must name a file"),
        ("{date}/", "must name a file"),
        ("", "must name a file"),
    ],
)
def test_patterns_that_cannot_name_a_file(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_pattern(pattern)
