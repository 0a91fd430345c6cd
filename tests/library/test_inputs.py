"""Images that requests start from: every file is a picture or an error, masks are read as AUTOMATIC1111 reads them."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageOps

from safelight.errors import RequestError
from safelight.library.inputs import Inputs, as_mask, opened


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
    assert np.array_equal(np.asarray(opened("image", data)), np.asarray(right))


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
            read += opened("image", bytes(spoiled)).width > 0
    assert read > 1900


def test_masks_are_read_by_their_alpha_where_they_have_any() -> None:
    stroke = PILImage.new("RGBA", (16, 16), (0, 0, 0, 0))
    for colour in ("white", "black"):
        stroke.paste(colour, (4, 4, 8, 8))
        assert as_mask("mask", saved(stroke)).getbbox() == (4, 4, 8, 8)
    assert as_mask("mask", saved(stroke.getchannel("A"))).getbbox() == (4, 4, 8, 8)
    opaque = PILImage.new("RGBA", (16, 16), "black")
    opaque.paste("white", (2, 2, 4, 4))
    assert as_mask("mask", saved(opaque)).getbbox() == (2, 2, 4, 4)


def test_what_is_wrong_names_the_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"12345")
    with pytest.raises(RequestError, match=r"bad\.png': is not an image that can be read: PNG, JPEG"):
        Inputs(root).taken("image", str(tmp_path / "bad.png"), by_path=True)
    with pytest.raises(Exception, match="nobody_at_all"):
        Inputs(root).taken("image", "~nobody_at_all/x.png", by_path=True)
