"""The route that reads the metadata of an image."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from safelight.pictures import infotext
from safelight.server.apis.base64_pictures import opened


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
    with opened("image", picture.image) as image:
        text, items = infotext.read(image)
    return PngInfo(info=text, items=items, parameters=infotext.fields(text))
