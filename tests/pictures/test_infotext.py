"""The text of picture files, of whatever program, and the fields in it."""

from __future__ import annotations

import io
import json
import time

import pytest
from PIL import Image as PILImage
from PIL import PngImagePlugin

from safelight.pictures import infotext, xmp
from safelight.pictures.chunks import quoted

TEXT = (
    "red apple, 国风 naïve\nNegative prompt: bad\n"
    'Steps: 4, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x96, Model: "odd, Seed: 42"'
)


def opened(form: str, **how: object) -> PILImage.Image:
    held = io.BytesIO()
    PILImage.new("RGB", (64, 64), "red").save(held, form, **how)  # type: ignore[arg-type]
    return PILImage.open(io.BytesIO(held.getvalue()))


def png(chunk: str) -> PILImage.Image:
    info = PngImagePlugin.PngInfo()
    if chunk == "iTXt":
        info.add_itxt("parameters", TEXT)
    elif chunk == "raw UTF-8":
        info.add(b"tEXt", b"parameters\0" + TEXT.encode())
    else:
        info.add_text("parameters", TEXT, zip=chunk == "zTXt")
    info.add_text("prompt", "{}")
    return opened("PNG", pnginfo=info)


@pytest.mark.parametrize("chunk", ["iTXt", "tEXt", "zTXt", "raw UTF-8"])
def test_png(chunk: str) -> None:
    text, items = infotext.read(png(chunk))
    assert (text, items) == (TEXT, {"prompt": "{}"})


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le", "utf-8"])
def test_exif(form: str, order: str) -> None:
    exif = PILImage.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + TEXT.encode(order)
    text, items = infotext.read(opened(form, exif=exif))
    assert text == TEXT
    assert items["exif comment"] == TEXT
    assert infotext.read(opened(form, exif=infotext.exif_of(TEXT)))[0] == TEXT


def test_a_packet_without_an_end_takes_no_time() -> None:
    began = time.process_time()
    assert xmp.find(b"<safelight:metadata>" * 200_000) is None
    assert time.process_time() - began < 1
    assert xmp.find(xmp.packet("a <b> & c")) == "a <b> & c"


def test_pictures_without_any_text() -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        text, _ = infotext.read(opened(form))
        assert (text, infotext.fields(text)) == ("", {}), form
    assert infotext.read(opened("GIF", comment=b"hello"))[0] == "hello"


def test_fields() -> None:
    found = infotext.fields(TEXT)
    assert found["Prompt"] == "red apple, 国风 naïve"
    assert found["Negative prompt"] == "bad"
    assert (found["Seed"], found["Size-1"], found["Size-2"]) == ("5", "64", "96")
    assert found["Model"] == "odd, Seed: 42"
    assert infotext.fields("only a prompt, with: two") == {"Prompt": "only a prompt, with: two", "Negative prompt": ""}


@pytest.mark.parametrize(
    "name", ["plain", "look, soft", "photo: v2", 'a "b"', "odd, Seed: 42, Steps: 99", "back\\slash:"]
)
def test_values_are_read_back_as_they_were(name: str) -> None:
    text = f"x\nSteps: 1, Sampler: Euler, Model: {quoted(name)}, Seed: 7"
    found = infotext.fields(text)
    assert (found["Model"], found["Seed"], found["Steps"]) == (name, "7", "1")
    assert json.loads(quoted("a, b")) == "a, b"
