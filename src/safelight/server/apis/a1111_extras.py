"""A1111's "extras": routes that enlarge pictures without a model."""

from __future__ import annotations

import base64
import io
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.request.bounds import MOST_PIXELS, MOST_SIDE
from safelight.server.apis.base64_pictures import opened
from safelight.server.problems import RefusedError

RESAMPLING = {"Lanczos": PILImage.Resampling.LANCZOS, "Nearest": PILImage.Resampling.NEAREST}
"""The upscalers, by A1111's names. "None" resizes with Lanczos in A1111, too."""

Upscaler = Literal["None", "Lanczos", "Nearest"]
Share = Annotated[float, FieldOf(ge=0, le=1)]
Side = Annotated[int, FieldOf(ge=1, le=MOST_SIDE)]

MOST_PICTURES = 64


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


def add_to(api: APIRouter) -> None:
    """Add the routes to a router."""
    api.post("/extra-single-image")(extra_single_image)
    api.post("/extra-batch-images")(extra_batch_images)


def extra_single_image(asked: ExtrasOfOne) -> ExtrasImage:
    """Enlarge a picture."""
    return ExtrasImage(html_info=_described(asked), image=_enlarged("image", asked.image, asked))


def extra_batch_images(asked: ExtrasOfMany) -> ExtrasImages:
    """Enlarge several pictures."""
    images = [_enlarged(f"imageList.{number}.data", one.data, asked) for number, one in enumerate(asked.imageList)]
    return ExtrasImages(html_info=_described(asked), images=images)


def _described(asked: Extras) -> str:
    how = f"by {asked.upscaling_resize:g}" if asked.resize_mode == 0 else "to a size"
    return f"enlarged {how}, {asked.upscaler_1}"


def _enlarged(field: str, text: str, asked: Extras) -> str:
    with opened(field, text) as picture:
        whole = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
    width, height = _size(whole, asked)
    if width * height > MOST_PIXELS:
        problem = f"{field}: would have {width}x{height} pixels; at most {MOST_PIXELS} are allowed"
        raise RefusedError(422, "invalid_request", problem, field)
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
