"""What an image is made over: the picture that it starts from, the mask, and how the result is put back.

White in a mask is drawn anew. Outside of it the picture's own pixels stay, exactly, but for the border, which
``mask_blur`` softens on both sides, as AUTOMATIC1111 does. A picture of another size than is drawn is scaled.
With ``mask_padding`` only the masked part is drawn, with so many pixels around it, at the whole size. For outpainting
the picture is made larger: what is new begins as its mirror image, and is what is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageFilter, ImageOps

from safelight.boundary import pictures
from safelight.catalog.inputs import Inputs
from safelight.errors import RequestError
from safelight.request.parts import Resize
from safelight.request.schema import Request

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """``picture`` and ``mask`` as they are worked on, of the size that is drawn; ``whole``: what the result goes back
    into, at ``box``, through ``soft``."""

    picture: PILImage.Image
    mask: PILImage.Image | None
    whole: PILImage.Image
    soft: PILImage.Image | None
    box: Box

    def part(self, picture: PILImage.Image) -> PILImage.Image:
        """Of a picture that goes with the whole: what goes with the part that is worked on."""
        if self.box == (0, 0, *self.whole.size):
            return picture
        return fitted(picture, self.whole.size).crop(self.box)

    def put_back(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (h, w, 3): the result, outside of the mask the picture itself."""
        if self.soft is None:
            return pixels
        left, top, right, bottom = self.box
        drawn = PILImage.fromarray(pixels.numpy())
        if drawn.size != (right - left, bottom - top):
            drawn = drawn.resize((right - left, bottom - top), PILImage.Resampling.LANCZOS)
        whole = self.whole.copy()
        whole.paste(drawn, (left, top))
        return torch.from_numpy(np.array(PILImage.composite(whole, self.whole, self.soft)))


def canvas(request: Request, inputs: Inputs, width: int, height: int) -> Canvas | None:
    """What the request starts from, None when it starts from noise. ``width``, ``height``: pixels that are drawn.

    Raises RequestError for a mask in which nothing is white.
    """
    if not request.image:
        return None
    size = width, height
    given = inputs.open(request.image)
    if not request.masked:
        picture = fitted(given, size)
        return Canvas(picture, None, picture, None, (0, 0, width, height))
    given, mask = _larger(given, request.outpaint) if request.outpaint else (given, inputs.open(request.mask))
    whole = fitted(given, size) if request.mask_padding is None else given
    mask = _sharp(fitted(mask.convert("L"), whole.size))
    if mask.getbbox() is None:
        raise RequestError("mask", request.mask[:16], "nothing in it is white: nothing would be drawn")
    soft = mask.filter(ImageFilter.GaussianBlur(request.mask_blur)) if request.mask_blur else mask
    if request.mask_padding is None:
        return Canvas(whole, mask, whole, soft, (0, 0, width, height))
    box = pictures.crop_region(mask, width, height, request.mask_padding)
    picture, part = (fitted(image.crop(box), size) for image in (whole, mask))
    return Canvas(picture, part, whole, soft, box)


def _larger(given: PILImage.Image, by: tuple[int, ...]) -> tuple[PILImage.Image, PILImage.Image]:
    """The picture in the middle of its mirror images, and the mask of what is new."""
    left, top, right, bottom = by
    pixels = np.pad(np.asarray(given), ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    new = np.pad(np.zeros((given.height, given.width), np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return PILImage.fromarray(pixels), PILImage.fromarray(new)


def shown(image: PILImage.Image, size: tuple[int, int], how: Resize) -> PILImage.Image:
    """The image in that size, for a ControlNet."""
    if how == "crop_resize":
        return ImageOps.fit(image, size, PILImage.Resampling.LANCZOS)
    if how == "fill_resize":
        return ImageOps.pad(image, size, PILImage.Resampling.LANCZOS)
    return fitted(image, size)


def fitted(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """The image in that size."""
    return image if image.size == size else image.resize(size, PILImage.Resampling.LANCZOS)


def _sharp(mask: PILImage.Image) -> PILImage.Image:
    return mask.point([255 * (value >= 128) for value in range(256)])
