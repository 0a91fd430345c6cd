"""Encodes a picture as a PNG, JPEG or WebP file. Each has the same metadata.

- PNG: chunks ``parameters`` (AUTOMATIC1111's text) and ``safelight`` (JSON)
- JPEG, WebP: Exif's UserComment has AUTOMATIC1111's text, and an XMP packet has the JSON
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image as PILImage
from PIL import PngImagePlugin

from safelight.errors import RequestError
from safelight.pictures import infotext, xmp
from safelight.pictures.chunks import parameters
from safelight.request.results import Image

ImageFormat = Literal["png", "jpeg", "webp"]

ENDINGS: Mapping[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

LOSSLESS = 100
"""The quality with which a WebP file has exactly the pixels of the image. JPEG never has."""

MOST_XMP_BYTES, MOST_EXIF_BYTES = 65_502, 65_533
"""A JPEG file has an XMP packet and an Exif block in one segment each."""


def encode(image: Image, form: ImageFormat = "png", quality: int = LOSSLESS) -> bytes:
    """Return the file's bytes. See :func:`encode_picture`."""
    picture = PILImage.frombytes("RGB", (image.width, image.height), image.pixels)
    return encode_picture(picture, image.metadata, form, quality)


def encode_picture(picture: PILImage.Image, metadata: Mapping[str, Any], form: ImageFormat, quality: int) -> bytes:
    """Return the file's bytes.

    ``quality``: 1 to 100, for JPEG and WebP. A WebP file of quality 100 is lossless.
    If the file has other pixels than the image, its metadata says so: ``encoding``.
    Raises RequestError if a JPEG file cannot hold the metadata.
    """
    out = io.BytesIO()
    if form == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", parameters(metadata))
        info.add_itxt("safelight", json.dumps(metadata, ensure_ascii=False))
        picture.save(out, "PNG", pnginfo=info)
        return out.getvalue()
    lossless = form == "webp" and quality == LOSSLESS
    stored = dict(metadata) if lossless else {**metadata, "encoding": f"{form}, quality {quality}"}
    packet = xmp.packet(json.dumps(stored, ensure_ascii=False))
    if form == "jpeg" and len(packet) > MOST_XMP_BYTES:
        problem = f"cannot hold {len(packet)} bytes of metadata, at most {MOST_XMP_BYTES}; use png or webp"
        raise RequestError("image_format", form, problem)
    exif = infotext.exif_of(parameters(metadata))
    if form == "jpeg" and len(exif) > MOST_EXIF_BYTES:
        problem = f"cannot hold {len(exif)} bytes of prompts and settings, at most {MOST_EXIF_BYTES}; use png or webp"
        raise RequestError("image_format", form, problem)
    if form == "jpeg":
        picture.save(out, "JPEG", quality=quality, subsampling=0, exif=exif, xmp=packet)
    else:
        # ``exact`` and ``method`` change no pixel of a lossless file.
        picture.save(out, "WEBP", quality=quality, lossless=lossless, exif=exif, xmp=packet)
    return out.getvalue()
