"""A1111's "extras": routes that enlarge pictures without a model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.assembly.services import Services
from safelight.queue.person import Person
from safelight.request.bounds import MOST_PIXELS, MOST_SIDE
from safelight.server import bridge
from safelight.server.access import Who
from safelight.server.apis.base64_pictures import opened
from safelight.server.intake import limits_of
from safelight.server.problems import RefusedError

RESAMPLING = {"Lanczos": PILImage.Resampling.LANCZOS, "Nearest": PILImage.Resampling.NEAREST}
"""The upscalers, by A1111's names. "None" resizes with Lanczos in A1111, too."""

Upscaler = Literal["None", "Lanczos", "Nearest"]
Share = Annotated[float, FieldOf(ge=0, le=1)]
Side = Annotated[int, FieldOf(ge=1, le=MOST_SIDE)]

MOST_PICTURES = 64

FULL_SIZE_PICTURES = 4
"""A batch has at most as many pixels as so many pictures of the largest size."""


class Extras(BaseModel):
    """How pictures are enlarged.

    ``resize_mode``: 0 by a factor, 1 to a size.
    ``upscaling_crop``: with a size, cut what would be outside; otherwise the picture is at least that size.
    ``upscaler_2``, ``extras_upscaler_2_visibility``: a second result, mixed with the first.
    The visibilities of GFPGAN and CodeFormer must be 0: Safelight has neither.
    """

    model_config = ConfigDict(extra="forbid")

    resize_mode: Literal[0, 1] = 0
    show_extras_results: bool = True
    gfpgan_visibility: Literal[0] = 0
    codeformer_visibility: Literal[0] = 0
    codeformer_weight: Share = 0
    upscaling_resize: Annotated[float, FieldOf(ge=1, le=8)] = 2
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: bool = True
    upscaler_1: Upscaler = "None"
    upscaler_2: Upscaler = "None"
    extras_upscaler_2_visibility: Share = 0
    upscale_first: bool = False


class ExtrasOfOne(Extras):
    """A picture to enlarge, in base64."""

    image: str


class FileData(BaseModel):
    """A picture of a batch. ``data``: in base64. ``name``: its file's, which has no effect."""

    data: str
    name: str = ""


class ExtrasOfMany(Extras):
    """Pictures to enlarge."""

    imageList: Annotated[list[FileData], FieldOf(min_length=1, max_length=MOST_PICTURES)]  # noqa: N815  (A1111's name)


class ExtrasImage(BaseModel):
    """``image``: a PNG in base64. ``html_info``: what was done."""

    html_info: str
    image: str


class ExtrasImages(BaseModel):
    """``images``: PNGs in base64, in the order of the request."""

    html_info: str
    images: list[str]


class ExtrasRoutes:
    """The routes that enlarge pictures."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/extra-single-image")(self.single_image)
        api.post("/extra-batch-images")(self.batch_images)

    async def single_image(self, asked: ExtrasOfOne, who: Who) -> ExtrasImage:
        """Enlarge a picture."""
        [image] = await bridge.long(self._enlarge, {"image": asked.image}, asked, who)
        return ExtrasImage(html_info=_described(asked), image=image)

    async def batch_images(self, asked: ExtrasOfMany, who: Who) -> ExtrasImages:
        """Enlarge several pictures."""
        given = {f"imageList.{number}.data": one.data for number, one in enumerate(asked.imageList)}
        return ExtrasImages(html_info=_described(asked), images=await bridge.long(self._enlarge, given, asked, who))

    def _enlarge(self, given: Mapping[str, str], asked: Extras, who: Person) -> list[str]:
        """Enlarge pictures, which are in base64 by the names of their fields.

        The answer has all of them. So its pixels are limited, and not only those of each.
        """
        most = limits_of(self._control, who).request.max_pixels or MOST_PIXELS
        left, images = most * (1 if len(given) == 1 else FULL_SIZE_PICTURES), list[str]()
        for field, text in given.items():
            picture, size = _opened(field, text, asked)
            pixels = size[0] * size[1]
            if pixels > min(most, left):
                problem = f"{field}: would have {size[0]}x{size[1]} pixels; at most {min(most, left)} are allowed"
                raise RefusedError(422, "invalid_request", problem, field)
            left -= pixels
            images.append(_enlarged(picture, size, asked))
        return images


def _described(asked: Extras) -> str:
    how = f"by {asked.upscaling_resize:g}" if asked.resize_mode == 0 else "to a size"
    return f"enlarged {how}, {asked.upscaler_1}"


def _opened(field: str, text: str, asked: Extras) -> tuple[PILImage.Image, tuple[int, int]]:
    """Return a picture, and its size after it is enlarged."""
    with opened(field, text) as picture:
        whole = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
    return whole, _size(whole, asked)


def _enlarged(whole: PILImage.Image, size: tuple[int, int], asked: Extras) -> str:
    width, height = size
    result = whole.resize((width, height), _resampling(asked.upscaler_1))
    if asked.upscaler_2 != "None" and asked.extras_upscaler_2_visibility:
        second = whole.resize((width, height), _resampling(asked.upscaler_2))
        result = PILImage.blend(result, second, asked.extras_upscaler_2_visibility)
    if asked.resize_mode == 1 and asked.upscaling_crop:
        left, top = (width - asked.upscaling_resize_w) // 2, (height - asked.upscaling_resize_h) // 2
        result = result.crop((left, top, left + asked.upscaling_resize_w, top + asked.upscaling_resize_h))
    held = io.BytesIO()
    result.save(held, "PNG", compress_level=1)
    return base64.b64encode(held.getvalue()).decode()


def _size(picture: PILImage.Image, asked: Extras) -> tuple[int, int]:
    """Return the size before anything is cut. The shape stays."""
    factor = asked.upscaling_resize
    if asked.resize_mode == 1:
        factor = max(asked.upscaling_resize_w / picture.width, asked.upscaling_resize_h / picture.height)
        # Rounding must not make a side too short.
        return (
            max(asked.upscaling_resize_w, round(picture.width * factor)),
            max(asked.upscaling_resize_h, round(picture.height * factor)),
        )
    return max(1, round(picture.width * factor)), max(1, round(picture.height * factor))


def _resampling(name: str) -> Any:
    return RESAMPLING.get(name, PILImage.Resampling.LANCZOS)
