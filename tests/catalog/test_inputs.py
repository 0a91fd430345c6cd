"""Images that requests start from: every file is a picture or an error, masks are lightness times alpha."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

from safelight.catalog.inputs import Inputs, as_mask, decode_image
from safelight.errors import RequestError


def saved(image: PILImage.Image, form: str = "PNG", **how: object) -> bytes:
    held = io.BytesIO()
    image.save(held, form, **how)  # type: ignore[arg-type]
    return held.getvalue()


def photograph(orientation: int) -> bytes:
    values = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)
    exif = PILImage.Exif()
    exif[274] = orientation
    exif[271] = "a maker of cameras"
    return saved(PILImage.fromarray(values), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int) -> None:
    data = photograph(orientation)
    with PILImage.open(io.BytesIO(data)) as image:
        right = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(decode_image("image", data)), np.asarray(right))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_gives_a_picture_or_an_error() -> None:
    chance, data = random.Random(5), photograph(6)
    begin, end = data.index(b"Exif"), data.index(b"cameras")
    read = 0
    for _ in range(2000):
        spoiled = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            spoiled[chance.randrange(begin, end)] = chance.randrange(256)
        with contextlib.suppress(RequestError):
            read += decode_image("image", bytes(spoiled)).width > 0
    assert read > 1900


MODES: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "PA", "I", "I;16", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "RGB", "RGBA"),
}
"""What Pillow writes into each format that is read."""


def _in_mode(grey: PILImage.Image, mode: str) -> PILImage.Image:
    """A grey picture in another mode; its alpha, where the mode has one, is opaque."""
    if mode.startswith("I"):
        wide = PILImage.fromarray(np.asarray(grey).astype(np.int32) * 257)
        return wide if mode == "I" else PILImage.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    if mode == "PA":
        return grey.convert("P").convert("PA")
    if mode == "LAB":
        return ImageCms.profileToProfile(
            grey.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    return grey.convert("RGB").convert(mode) if mode not in ("1", "L", "LA", "P") else grey.convert(mode)


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_masks_are_their_lightness_times_their_alpha_in_every_mode(form: str, mode: str) -> None:
    if (form, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow 12 cannot read the YCbCr TIFF that it writes")
    grey = PILImage.new("L", (16, 16), 0)
    grey.paste(255, (0, 0, 8, 16))
    how = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "JPEG" else {}
    picture = _in_mode(grey, mode)
    mask = np.asarray(as_mask("mask", saved(picture, form, **how))).astype(int)
    assert np.abs(mask - np.asarray(grey)).max() <= 4, mode
    if mode not in ("LA", "RGBA") or form in ("GIF", "BMP"):
        return
    # One pixel that is not opaque changes that pixel and no other.
    picture.putpixel((2, 2), (255, 40) if mode == "LA" else (255, 255, 255, 40))
    changed = np.asarray(as_mask("mask", saved(picture, form, **how))).astype(int)
    assert changed[2, 2] == 40
    changed[2, 2] = mask[2, 2]
    assert (changed == mask).all()


def test_a_value_that_a_file_calls_transparent_is_transparent_in_masks() -> None:
    for mode, value in (("L", 255), ("RGB", (255, 255, 255)), ("1", 255), ("I;16", 65535)):
        grey = PILImage.new("L", (16, 16), 0)
        grey.paste(255, (0, 0, 8, 16))
        picture = _in_mode(grey, mode)
        assert as_mask("mask", saved(picture)).getbbox() == (0, 0, 8, 16)
        assert as_mask("mask", saved(picture, transparency=value)).getbbox() is None, mode


def test_masks_of_strokes_are_where_they_are_light() -> None:
    stroke = PILImage.new("RGBA", (16, 16), (0, 0, 0, 0))
    stroke.paste("white", (4, 4, 8, 8))
    assert as_mask("mask", saved(stroke)).getbbox() == (4, 4, 8, 8)
    assert as_mask("mask", saved(stroke.getchannel("A"))).getbbox() == (4, 4, 8, 8)
    opaque = PILImage.new("RGBA", (16, 16), "black")
    opaque.paste("white", (2, 2, 4, 4))
    assert as_mask("mask", saved(opaque)).getbbox() == (2, 2, 4, 4)


def test_what_is_wrong_names_the_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"12345")
    with pytest.raises(RequestError, match=r"bad\.png': is not an image in a supported format \(PNG, JPEG"):
        Inputs(root).store_from_request("image", str(tmp_path / "bad.png"), by_path=True)
    with pytest.raises(Exception, match="nobody_at_all"):
        Inputs(root).store_from_request("image", "~nobody_at_all/x.png", by_path=True)


def test_what_nothing_names_goes_to_the_trash_and_comes_back_when_it_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(root)
    digests = [inputs.store("image", saved(PILImage.new("RGB", (8, 8), colour))) for colour in ("red", "green", "blue")]
    assert inputs.sweep([], 30) == (0, 0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86_400)
    assert inputs.sweep([digests[0]], 30) == (2, 0)
    assert (root / f"trash/inputs/{digests[1]}.png").exists()
    assert inputs.store_from_request("image", digests[1], by_path=False) == digests[1]
    assert inputs.open(digests[1]).size == (8, 8)
    monkeypatch.setattr(time, "time", lambda: now + 40 * 86_400)
    moved, removed = inputs.sweep(digests[:2], 30)
    assert (moved, removed) == (0, 1)
    with pytest.raises(RequestError, match=f"{digests[2]}.*is gone"):
        inputs.store_from_request("image", digests[2], by_path=False)


def test_an_image_that_a_request_is_about_to_use_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(root)
    digest = inputs.store("image", saved(PILImage.new("RGB", (8, 4))))
    old = time.time() - 3 * 86_400
    os.utime(root / f"inputs/{digest}.png", (old, old))
    assert inputs.store_from_request("image", digest, by_path=False) == digest
    assert inputs.sweep([], 30) == (0, 0)
    os.utime(root / f"inputs/{digest}.png", (old, old))
    assert inputs.sweep([], 30) == (1, 0)
    assert inputs.size(digest) == (8, 4)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_value_that_a_grey_png_of_few_bits_calls_transparent(depth: int) -> None:
    most = 2**depth - 1
    picture = png(depth, 0, bytes([0, most << (8 - depth)]), struct.pack(">H", most))
    assert list(as_mask("mask", picture).getdata()) == [0]
    picture = png(depth, 0, bytes([0, most << (8 - depth)]), struct.pack(">H", 0))
    assert list(as_mask("mask", picture).getdata()) == [255]


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    picture = png(16, 2, bytes([0, *([255] * 6)]), struct.pack(">HHH", 255, 255, 255))
    with pytest.raises(RequestError, match="save it with an alpha channel"):
        as_mask("mask", picture)


def png(depth: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one pixel, as the specification has it (W3C, PNG 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
