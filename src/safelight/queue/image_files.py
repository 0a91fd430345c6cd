"""Image files, written completely or not at all, and never over another file; and the server's folder of images."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from safelight.errors import FileError
from safelight.file_patterns import DEFAULT
from safelight.files.disk import (
    flush_to_disk,
    numbered_names,
    place_new,
    temporary_file_in,
    write_new,
    write_whole,
)
from safelight.logs import Log
from safelight.pictures.file_format import ENDINGS, LOSSLESS, ImageFormat, encode
from safelight.pictures.file_names import file_stem
from safelight.pictures.opening import opened
from safelight.queue.stored_image import StoredImage
from safelight.queue.unfinished import UnfinishedImages
from safelight.request.results import Image, Preview

_log = Log(__name__)


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


READ = ("PNG", "JPEG", "WEBP", "AVIF")
"""Pillow's names of the formats of imported images."""


MARKERS = ".unfinished"
"""The folder in which earlier versions had a file for each unfinished image."""


class Gallery:
    """The server's folder of images, in folders by date, and a thumbnail of each.

    ``names``: the pattern of the names; see :mod:`safelight.file_patterns`.

    An image's file is written before its row in the database. It is named in a list until the row is there, so that the
    next start can remove what a killed server left.
    """

    def __init__(self, folder: Path, names: str = DEFAULT) -> None:
        self._images = folder / "images"
        self._thumbnails = folder / "thumbnails"
        self._unfinished = UnfinishedImages(self._images / ".unfinished.jsonl")
        self._names = names if "{date}" in names else f"{{date}}/{names}"

    def put(self, image: Image, image_id: str) -> str:
        """Write the image and its thumbnail, and return the path of its file, below the folder of images.

        Call :meth:`finish` when the row is there. Never replaces a file: a number is added to the name.
        Raises UnreadableFileError when the folder cannot be written.
        """
        picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
        stem = file_stem(image, self._names)
        with temporary_file_in((self._images / stem).parent) as (file, temporary):
            file.write(encode(image))
            flush_to_disk(file, temporary)
            for name in numbered_names(stem, ENDINGS["png"]):
                if (self._images / name).exists():
                    continue
                # From now on, a killed server's next start removes both files, if the row is not there by then.
                self._unfinished.add({image_id: name})
                # A thumbnail that is lost with the power is made again.
                try:
                    write_whole(self.thumbnail(image_id), _thumbnail(picture), wait=False)
                except FileError:
                    # The name must not stay in the list: another file may get it.
                    self.finish(image_id)
                    raise
                with contextlib.suppress(FileExistsError):
                    place_new(temporary, self._images / name)
                    return name
        raise AssertionError

    def finish(self, image_id: str) -> None:
        """Note that the image's row is there, or its files are gone."""
        self._unfinished.finish(image_id)

    def path(self, image: StoredImage) -> Path:
        """Return the path of an image's file."""
        return self._images / image.file

    def size(self, file: str) -> int:
        """Return the size of an image's file, in bytes. ``file``: its path below the folder of images."""
        return (self._images / file).stat().st_size

    def thumbnail(self, image_id: str) -> Path:
        """Return the path of an image's thumbnail. That of an imported image exists once it was made."""
        return self._thumbnails / f"{image_id}.webp"

    def make_thumbnail(self, image: StoredImage) -> Path:
        """Return the path of an image's thumbnail; make it if there is none. Raises FileError if it cannot be read."""
        path = self.thumbnail(image.id)
        if not path.exists() or not path.stat().st_size:
            with opened(self.path(image), READ) as picture:
                write_whole(path, _thumbnail(picture.convert("RGB")), wait=False)
        return path

    def mark(self, images: Iterable[StoredImage]) -> None:
        """Note that images are about to be deleted: their files go at the next start, if their rows are gone then."""
        # The file of an imported image is not ours.
        self._unfinished.add({image.id: "" if image.imported else image.file for image in images})

    def remove(self, image: StoredImage) -> None:
        """Remove an image's files. The file of an imported image stays, because it is not ours.

        What cannot be removed now stays in the list, for the next start.
        """
        try:
            self.thumbnail(image.id).unlink(missing_ok=True)
            if not image.imported:
                path = self.path(image)
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    # Only an empty folder goes.
                    if path.parent != self._images:
                        path.parent.rmdir()
        except OSError as error:
            _log.warning("a deleted image's file could not be removed", image=image.id, why=str(error))
            return
        self.finish(image.id)

    def sweep(self, known: Collection[str]) -> int:
        """Remove the files of images that a killed server did not finish, and return their number.

        ``known``: the files of all images.
        """
        removed, stay = 0, dict[str, str]()
        for image_id, name in {**self._markers(), **self._unfinished.read()}.items():
            # Somebody may have imported the folder of images into a new database: then its paths are absolute.
            if name in known or str((self._images / name).absolute()) in known:
                continue
            left = [self.thumbnail(image_id), *([self._images / name] if name else [])]
            for path in left:
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed += 1
            if any(path.exists() for path in left):
                stay[image_id] = name
        self._unfinished.keep(stay)
        shutil.rmtree(self._images / MARKERS, ignore_errors=True)
        for left in self._images.glob("**/.safelight-*"):
            with contextlib.suppress(OSError):
                left.unlink()
                removed += 1
        return removed

    def _markers(self) -> dict[str, str]:
        """Return what an earlier version left: a file for each unfinished image."""
        found = (self._images / MARKERS).glob("*")
        return {marker.name: marker.read_text(errors="replace") for marker in found}


def _thumbnail(picture: PILImage.Image) -> bytes:
    """Return a WebP file of the picture, whose shape it keeps."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=85)
    return out.getvalue()
