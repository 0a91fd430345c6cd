"""Image files, written completely or not at all, and never over another file; and the server's folder of images."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from safelight.file_patterns import DEFAULT
from safelight.files.disk import write_new, write_whole
from safelight.pictures.file_format import ENDINGS, LOSSLESS, ImageFormat, encode
from safelight.pictures.file_names import file_stem
from safelight.request.results import Image, Preview


@dataclass(frozen=True, slots=True)
class FileForm:
    """How images are written: the format, the quality of JPEG and WebP (1 to 100), and the pattern of the names."""

    format: ImageFormat = "png"
    quality: int = LOSSLESS
    names: str = DEFAULT


def save(image: Image, folder: Path, form: FileForm = FileForm()) -> Path:
    """Write the image to ``folder``, and return the path. Never replaces a file: a number is added to the name.

    Raises UnreadableFileError when the folder cannot be written, RequestError if the format cannot hold the metadata.
    """
    place = folder / file_stem(image, form.names)
    return write_new(place.parent, place.name, ENDINGS[form.format], encode(image, form.format, form.quality))


def preview_png(preview: Preview) -> bytes:
    """Return the preview as a PNG file with one pixel for each latent."""
    out = io.BytesIO()
    PILImage.frombytes("RGB", (preview.width, preview.height), preview.pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def preview_url(preview: Preview) -> str:
    """Return the preview as a data URL, which contains the PNG file."""
    return f"data:image/png;base64,{base64.b64encode(preview_png(preview)).decode()}"


THUMBNAIL = 384
"""The longer side of a thumbnail, in pixels."""


class Gallery:
    """The server's folder of images by identifier, each with a thumbnail."""

    def __init__(self, folder: Path) -> None:
        self._images = folder / "images"
        self._thumbnails = folder / "thumbnails"

    def put(self, image: Image, image_id: str) -> str:
        """Write the image and its thumbnail, and return the image's file name.

        Raises UnreadableFileError when the folder cannot be written.
        """
        name = f"{image_id}.png"
        write_whole(self._thumbnails / f"{image_id}.webp", _thumbnail(image))
        write_whole(self._images / name, encode(image))
        return name

    def path(self, name: str) -> Path:
        """Return the path of the image with this file name."""
        return self._images / Path(name).name

    def thumbnail(self, name: str) -> Path:
        """Return the path of the thumbnail of the image with this file name."""
        return self._thumbnails / f"{Path(name).stem}.webp"

    def remove(self, name: str) -> None:
        for path in (self.path(name), self.thumbnail(name)):
            path.unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> int:
        """Remove the files that belong to no image, and return their number. A killed server leaves such files.

        ``known``: the file names of all images.
        """
        stems = {Path(name).stem for name in known}
        removed = 0
        for path in (*self._images.glob("*"), *self._thumbnails.glob("*")):
            # Other programs may use this folder too: remove only files with names that Safelight gives.
            if _OURS.fullmatch(path.name) and path.stem not in stems:
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed


_OURS = re.compile(r"[0-9a-f]{32}\.(png|webp)|\.safelight-.*")


def _thumbnail(image: Image) -> bytes:
    small = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=85)
    return out.getvalue()
