"""Contact sheets: the images of several models side by side, with their names and digests below."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from safelight.files.disk import write_new
from safelight.request.results import Image

_TILE = 256
"""Pixels per side of a picture on the sheet. Small pictures are enlarged by a whole factor."""

_GAP, _LABEL = 24, 64
_PAPER, _INK, _FAINT, _ALARM = (250, 249, 246), (34, 32, 30), (128, 122, 116), (160, 30, 20)


MOST_TILES = 200
"""Pictures on a sheet. Any further ones are only in their own files."""


class Sheet:
    """A contact sheet to which pictures are added one by one. It stores small tiles, not the pictures."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._tiles: list[tuple[PILImage.Image, str, str, bool]] = []

    def add(self, image: Image, label: str = "") -> None:
        """Add a picture. ``label``: replaces its model's name. The sheet also shows whether the image has marks."""
        if len(self._tiles) < MOST_TILES:
            picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
            marked = bool(image.metadata.get("marks"))
            self._tiles.append((_fitted(picture), label or image.model, image.pixels_sha256, marked))

    def save(self, folder: Path) -> Path:
        """Write the sheet into a folder, as ``sheet.png`` (or ``sheet-2.png``, …), with four pictures per row.

        Returns the path. Raises UnreadableFileError if the file cannot be written.
        """
        columns = min(len(self._tiles), 4)
        rows = -(-len(self._tiles) // columns)
        size = (_GAP + columns * (_TILE + _GAP), _GAP * 2 + 24 + rows * (_TILE + _LABEL + _GAP))
        sheet = PILImage.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(sheet)
        large, small = ImageFont.load_default(18), ImageFont.load_default(13)
        pen.text((_GAP, _GAP - 6), self._title, _INK, large)
        for number, (tile, model, digest, marked) in enumerate(self._tiles):
            left = _GAP + number % columns * (_TILE + _GAP)
            top = _GAP * 2 + 18 + number // columns * (_TILE + _LABEL + _GAP)
            sheet.paste(tile, (left, top))
            pen.text((left, top + _TILE + 8), model, _INK, large)
            below = f"pixels {digest[:20]}" + ("   marked as suspicious" if marked else "")
            pen.text((left, top + _TILE + 34), below, _ALARM if marked else _FAINT, small)
        return _write(sheet, folder)


def _write(sheet: PILImage.Image, folder: Path) -> Path:
    """Write a sheet into a folder without replacing a file. Returns its path."""
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return write_new(folder, "sheet", ".png", out.getvalue())


def _fitted(picture: PILImage.Image) -> PILImage.Image:
    """Put the picture on a square tile: enlarged by a whole factor or reduced, never stretched."""
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


_MARGIN = 150
"""Width of the row labels, in pixels."""


class GridSheet:
    """A sheet with labelled columns and rows. ``x`` and ``y``: the name of what varies, and its values."""

    def __init__(self, title: str, x: tuple[str, tuple[str, ...]], y: tuple[str, tuple[str, ...]] | None) -> None:
        self._title = title
        self._x, self._y = x, y
        self._tiles: dict[tuple[int, int], PILImage.Image] = {}

    def add(self, path: Path, column: int, row: int) -> None:
        """Add the picture in a file."""
        with PILImage.open(path) as picture:
            self._tiles[column, row] = _fitted(picture.convert("RGB"))

    def save(self, folder: Path) -> Path:
        """Write the sheet into a folder, as ``sheet.png`` (or ``sheet-2.png``, …).

        Returns the path. Raises UnreadableFileError if the file cannot be written.
        """
        columns, rows = self._x[1], self._y[1] if self._y is not None else ("",)
        left, top = _GAP + (_MARGIN if self._y is not None else 0), _GAP * 2 + 64
        size = (left + len(columns) * (_TILE + _GAP), top + len(rows) * (_TILE + _GAP))
        sheet = PILImage.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(sheet)
        large, small = ImageFont.load_default(18), ImageFont.load_default(15)
        names = self._x[0] if self._y is None else f"{self._x[0]} by {self._y[0]}"
        pen.text((_GAP, _GAP - 6), f"{self._title}   ({names})", _INK, large)
        for column, value in enumerate(columns):
            pen.text((left + column * (_TILE + _GAP), top - 30), _short(value, 30), _INK, small)
        for row, value in enumerate(rows):
            at = top + row * (_TILE + _GAP)
            pen.text((_GAP, at + _TILE // 2 - 8), _short(value, 17), _INK, small)
            for column in range(len(columns)):
                if (column, row) in self._tiles:
                    sheet.paste(self._tiles[column, row], (left + column * (_TILE + _GAP), at))
        return _write(sheet, folder)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
