"""The contact sheet: the images of several models side by side, with their names and digests beneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from safelight.types import Image

_TILE = 256
"""Pixels a side of a picture on the sheet; small pictures are enlarged by whole factors."""

_GAP, _LABEL = 24, 64
_PAPER, _INK, _FAINT = (250, 249, 246), (34, 32, 30), (128, 122, 116)


def draw(images: Sequence[Image], title: str, path: Path) -> None:
    """Write the sheet as a PNG file: a row of up to four pictures, then the next row."""
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    size = (_GAP + columns * (_TILE + _GAP), _GAP * 2 + 24 + rows * (_TILE + _LABEL + _GAP))
    sheet = PILImage.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    pen.text((_GAP, _GAP - 6), title, _INK, large)
    for number, image in enumerate(images):
        left = _GAP + number % columns * (_TILE + _GAP)
        top = _GAP * 2 + 18 + number // columns * (_TILE + _LABEL + _GAP)
        picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
        sheet.paste(_fitted(picture), (left, top))
        pen.text((left, top + _TILE + 8), image.model, _INK, large)
        pen.text((left, top + _TILE + 34), f"pixels {image.pixels_sha256[:20]}", _FAINT, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _fitted(picture: PILImage.Image) -> PILImage.Image:
    """The picture on a square tile: enlarged by a whole factor, or made smaller, never stretched."""
    longest = max(picture.size)
    if longest <= _TILE:
        factor = max(1, _TILE // longest)
        fitted = picture.resize((picture.width * factor, picture.height * factor), PILImage.Resampling.BICUBIC)
    else:
        fitted = picture.copy()
        fitted.thumbnail((_TILE, _TILE), PILImage.Resampling.LANCZOS)
    tile = PILImage.new("RGB", (_TILE, _TILE), _PAPER)
    tile.paste(fitted, ((_TILE - fitted.width) // 2, (_TILE - fitted.height) // 2))
    return tile
