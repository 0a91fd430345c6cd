"""The route that reads the metadata of an image."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image as PILImage
from pydantic import BaseModel

from safelight.catalog.inputs import FORMATS
from safelight.pictures import infotext
from safelight.request.bounds import MOST_PIXELS
from safelight.server.problems import RefusedError


class Base64Image(BaseModel):
    """A PNG in base64, with or without ``data:image/png;base64,``."""

    image: str


class PngInfo(BaseModel):
    """The metadata of an image. ``info``: the text in the image file."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


def png_info(picture: Base64Image) -> PngInfo:
    """Return the text in an image file that says how the image was made."""
    try:
        data = base64.b64decode(picture.image.rpartition(",")[2], validate=True)
        with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise RefusedError(422, "invalid_request", f"image: has more than {MOST_PIXELS} pixels", "image")
            text, items = infotext.read(image)
    except (binascii.Error, OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise RefusedError(422, "invalid_request", f"image: cannot be read ({error})", "image") from error
    return PngInfo(info=text, items=items, parameters=infotext.fields(text))
