"""Input images of requests, stored under a hash of their content. So a job, a rerun of it and the metadata of its
images all refer to the same picture.

``ROOT/inputs/DIGEST.png`` holds the pixels in the form in which jobs use them (RGB, upright). ``DIGEST`` is the SHA-256
(hex) of the size and these pixels.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageChops, UnidentifiedImageError

from safelight.catalog import paths
from safelight.catalog.index_file import IndexFile, stamp_of
from safelight.errors import IntegrityError, RequestError
from safelight.files.disk import read_file, write_whole
from safelight.request.bounds import MOST_PIXELS

YOUNG_SECONDS = 86_400
"""Seconds: one day. Younger images stay, because a request may be about to name them."""

REMOVED_EXPLANATION = "Safelight removes images that no waiting job and no stored picture uses (setting trash_days)"

SEND_AGAIN = "Send the input image again."

DIGEST = re.compile(r"[0-9a-f]{64}")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The supported formats. Pillow reads many more, but runs other programs for some of them."""

_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""How to turn a picture upright, by its orientation (Exif 2.3, tag 274)."""

_ORIENTATION = 274

_DATA = re.compile(r"data:image/[a-z+.-]+;base64,")


def decode_image(field: str, data: bytes, transparent: bool = False, name: str = "") -> PILImage.Image:
    """Decode an image file (PNG, JPEG, WebP, GIF, BMP, TIFF) into an upright picture of 8 bits per channel.

    ``field``, ``name``: the request's field and the file's name, for errors.
    ``transparent``: return RGBA. Otherwise return L or RGB, with transparent pixels on white.
    Raises RequestError when the file is not a supported image, or has too many pixels.
    """
    try:
        with PILImage.open(io.BytesIO(data), formats=FORMATS) as found:
            if found.width * found.height > MOST_PIXELS:
                raise RequestError(field, f"{found.width}x{found.height}", f"is over {MOST_PIXELS} pixels")
            _mend_transparency(field, found, data)
            turn = _UPRIGHT.get(_orientation(found))
            image = found if turn is None else found.transpose(turn)
            if image.mode.startswith(("I", "F")):
                image = _narrowed(field, image)
            if transparent:
                return image.convert("RGBA")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except UnidentifiedImageError as error:
        problem = f"is not an image in a supported format ({', '.join(FORMATS)})"
        raise RequestError(field, name or f"{len(data)} bytes", problem) from error
    except (OSError, SyntaxError, ValueError, NotImplementedError, PILImage.DecompressionBombError) as error:
        problem = f"is not an image that can be read ({error})"
        raise RequestError(field, name or f"{len(data)} bytes", problem) from error


def _mend_transparency(field: str, image: PILImage.Image, data: bytes) -> None:
    """Rescale the PNG's tRNS value as Pillow rescales pixels.

    Pillow widens pixels of 2 and 4 bits to 8 bits, and keeps only the upper byte of those of 16 bits, but leaves the
    transparent value as it is. Raises RequestError where the converted value would be ambiguous.
    """
    hidden = image.info.get("transparency")
    if image.format != "PNG" or hidden is None or len(data) < 26:
        return
    depth, colour = data[24], data[25]
    if colour == 0 and depth in (2, 4) and isinstance(hidden, int):
        image.info["transparency"] = hidden * 255 // (2**depth - 1)
    elif colour == 2 and depth == 16:
        raise RequestError(field, "RGB, 16 bits", "marks a colour as transparent; save it with an alpha channel")


def _orientation(image: PILImage.Image) -> int:
    """Return the orientation from the picture's Exif block; 1 (upright) if the block is missing or damaged."""
    try:
        found: object = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - Pillow raises any exception for a damaged block, and the picture itself is sound
        return 1
    return found if isinstance(found, int) else 1


def as_mask(field: str, data: bytes, name: str = "") -> PILImage.Image:
    """Decode an image file into a mask (L). White areas are drawn again.

    The mask is the picture's lightness times its alpha, for any mode.
    Raises RequestError as :func:`decode_image` does.
    """
    picture = decode_image(field, data, transparent=True, name=name)
    return ImageChops.multiply(picture.convert("RGB").convert("L"), picture.getchannel("A"))


def _narrowed(field: str, image: PILImage.Image) -> PILImage.Image:
    """Convert grey of 16 bits to 8 bits (L), or to LA if the file marks a value as transparent."""
    if image.mode == "F":
        raise RequestError(field, image.mode, "is an image of floating-point numbers; save it with 8 bits")
    values = np.asarray(image).astype(np.int64)
    grey = PILImage.fromarray((values // 257).clip(0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(PILImage.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


class Inputs:
    """The input images under ``root``. The folder need not exist."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "inputs"
        self._trash = root / "trash" / "inputs"
        self._index = IndexFile(root / "index.db")

    def store(self, field: str, data: bytes, name: str = "") -> str:
        """Store an image file and return its digest. If ``field`` is ``mask``, the file is decoded as a mask.

        Raises RequestError as :func:`decode_image` does.
        """
        read = as_mask(field, data, name) if field == "mask" else decode_image(field, data, name=name)
        image = read.convert("RGB")
        digest = _digest(image)
        try:
            self.open(digest)
        except IntegrityError:
            buffer = io.BytesIO()
            image.save(buffer, "PNG", compress_level=1)
            write_whole(self._path(digest), buffer.getvalue())
        return digest

    def store_from_request(self, field: str, value: str, by_path: bool) -> str:
        """Return the digest of an image in a request, and store the image if needed.

        ``value``: a digest, ``data:image/…;base64,…``, or a path if ``by_path``.
        Raises RequestError for a value that is not an image, and for a digest whose image is gone.
        """
        if DIGEST.fullmatch(value):
            if not self._restore_and_touch(value):
                raise RequestError(field, value, f"this image is gone: {REMOVED_EXPLANATION}")
            return value
        found = _DATA.match(value)
        if found is not None:
            try:
                return self.store(field, base64.b64decode(value[found.end() :], validate=True))
            except ValueError as error:
                raise RequestError(field, value[:40], f"is not base64 ({error})") from error
        if not by_path:
            raise RequestError(field, value[:40], "must be an image in base64 (data:image/png;base64,…) or a digest")
        return self.store(field, read_file(paths.user_path(value)), value)

    def size(self, digest: str) -> tuple[int, int]:
        """Return (width, height) of an image in pixels, from the index or its header.

        Raises IntegrityError when it is gone.
        """
        self._restore_and_touch(digest)
        path = self._path(digest)
        stamp = stamp_of(path)
        known = None if stamp is None else self._index.input_size(digest, stamp)
        if known is not None:
            return known
        try:
            with PILImage.open(path) as opened:
                found = opened.size
        except (OSError, SyntaxError, ValueError) as error:
            raise IntegrityError(path, "", f"an input image cannot be read ({error})", SEND_AGAIN) from error
        if stamp is not None:
            self._index.store_input(digest, stamp, found)
        return found

    def stored_digest(self, digest: str) -> str:
        """Return the digest if its image is stored, "" otherwise."""
        return digest if DIGEST.fullmatch(digest) and self._restore_and_touch(digest) else ""

    def bytes_of(self, digests: Iterable[str]) -> int:
        """Return the size of the files of stored images, in bytes. Deleted ones, and those in the trash, have none."""
        found = 0
        for digest in digests:
            with contextlib.suppress(OSError):
                found += self._path(digest).stat().st_size
        return found

    def _restore_and_touch(self, digest: str) -> bool:
        """Return whether an image is stored. Moves it out of the trash if needed.

        Sets its modification time to now, because a request is about to name it: :meth:`sweep` then leaves it.
        """
        path = self._path(digest)
        with contextlib.suppress(OSError):
            if not path.exists():
                os.replace(self._trash / path.name, path)
            os.utime(path)
            return True
        return path.exists()

    def sweep(self, in_use: Collection[str], days: float) -> tuple[int, int]:
        """Move unused images older than a day into the trash, and delete old images from the trash.

        ``in_use``: digests in use.
        ``days``: age in the trash after which an image is deleted.
        Returns (images moved, images deleted).
        """
        moved = removed = 0
        gone: list[str] = []
        now = time.time()
        for path in self._folder.glob("*.png"):
            if path.stem not in in_use and DIGEST.fullmatch(path.stem) and now - path.stat().st_mtime > YOUNG_SECONDS:
                self._trash.mkdir(parents=True, exist_ok=True)
                os.utime(path, (now, now))
                os.replace(path, self._trash / path.name)
                moved += 1
        for path in self._trash.glob("*.png"):
            if now - path.stat().st_mtime > days * 86_400:
                path.unlink(missing_ok=True)
                gone.append(path.stem)
                removed += 1
        self._index.forget_inputs(gone)
        return moved, removed

    def open(self, digest: str) -> PILImage.Image:
        """Return an image (RGB). Raises IntegrityError when it is gone, or when its pixels changed."""
        self._restore_and_touch(digest)
        try:
            with PILImage.open(self._path(digest)) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            problem = f"an input image cannot be read ({error})"
            raise IntegrityError(self._path(digest), "", problem, SEND_AGAIN) from error
        if _digest(image) != digest:
            raise IntegrityError(self._path(digest), "", "the pixels of this input image changed", SEND_AGAIN)
        return image

    def read(self, digest: str) -> bytes:
        """Return the PNG file of an image. Raises IntegrityError when it is gone, or when its pixels changed."""
        self.open(digest)
        return self._path(digest).read_bytes()

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.png"


def _digest(image: PILImage.Image) -> str:
    return hashlib.sha256(f"{image.width}x{image.height}\0".encode() + image.tobytes()).hexdigest()
