"""The input picture and mask of an image, and pasting the result back into the picture.

White areas of the mask are redrawn. All other pixels stay identical, except at the border, which ``mask_blur`` softens
on both sides, as AUTOMATIC1111 does. A picture of a different size is scaled to the drawn size. With ``mask_padding``,
only the masked area plus that many pixels around it is drawn, at full resolution (A1111's "only masked"). For
outpainting, the picture is extended: the new area is filled with the mirrored picture and masked.
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
from safelight.request.adapters import Resize
from safelight.request.schema import Request

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """The input picture and mask of an image-to-image or inpainting request, and where to paste the result.

    ``picture``, ``mask``: in the drawn size.
    ``original``: the full picture.
    ``paste_mask``: the blurred mask for pasting the result, None to use the result as it is.
    ``box``: where the result is pasted into the original.
    """

    picture: PILImage.Image
    mask: PILImage.Image | None
    original: PILImage.Image
    paste_mask: PILImage.Image | None
    box: Box

    def crop(self, picture: PILImage.Image) -> PILImage.Image:
        """Crop a ControlNet's picture, which covers the whole input picture, to the part that is drawn."""
        if self.box == (0, 0, *self.original.size):
            return picture
        return resize(picture, self.original.size).crop(self.box)

    def paste(self, pixels: torch.Tensor) -> torch.Tensor:
        """Paste the result into the original picture. Returns uint8 (h, w, 3)."""
        if self.paste_mask is None:
            return pixels
        left, top, right, bottom = self.box
        drawn = PILImage.fromarray(pixels.numpy())
        if drawn.size != (right - left, bottom - top):
            drawn = drawn.resize((right - left, bottom - top), PILImage.Resampling.LANCZOS)
        pasted = self.original.copy()
        pasted.paste(drawn, (left, top))
        return torch.from_numpy(np.array(PILImage.composite(pasted, self.original, self.paste_mask)))


def make_canvas(request: Request, inputs: Inputs, width: int, height: int) -> Canvas | None:
    """Return the canvas of a request, None if it starts from noise.

    ``width``, ``height``: the drawn size in pixels.
    Raises RequestError for a mask in which nothing is white.
    """
    if not request.image:
        return None
    size = width, height
    given = inputs.open(request.image)
    if not request.masked:
        picture = resize(given, size)
        return Canvas(picture, None, picture, None, (0, 0, width, height))
    given, mask = _extend(given, request.outpaint) if request.outpaint else (given, inputs.open(request.mask))
    original = resize(given, size) if request.mask_padding is None else given
    mask = _binarize(resize(mask.convert("L"), original.size))
    if mask.getbbox() is None:
        raise RequestError("mask", request.mask[:16], "nothing in it is white: nothing would be drawn")
    paste_mask = mask.filter(ImageFilter.GaussianBlur(request.mask_blur)) if request.mask_blur else mask
    if request.mask_padding is None:
        return Canvas(original, mask, original, paste_mask, (0, 0, width, height))
    box = pictures.crop_region(mask, width, height, request.mask_padding)
    picture, part = (resize(image.crop(box), size) for image in (original, mask))
    return Canvas(picture, part, original, paste_mask, box)


def _extend(given: PILImage.Image, by: tuple[int, ...]) -> tuple[PILImage.Image, PILImage.Image]:
    """Extend a picture by mirroring. Returns the picture and the mask of the new area."""
    left, top, right, bottom = by
    pixels = np.pad(np.asarray(given), ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    new = np.pad(np.zeros((given.height, given.width), np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return PILImage.fromarray(pixels), PILImage.fromarray(new)


def resize_for_control(image: PILImage.Image, size: tuple[int, int], how: Resize) -> PILImage.Image:
    """Resize the picture of a ControlNet, in the way that the request asks for."""
    if how == "crop_resize":
        return ImageOps.fit(image, size, PILImage.Resampling.LANCZOS)
    if how == "fill_resize":
        return ImageOps.pad(image, size, PILImage.Resampling.LANCZOS)
    return resize(image, size)


def resize(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """Resize an image. Returns the image itself if it has the size already."""
    return image if image.size == size else image.resize(size, PILImage.Resampling.LANCZOS)


def _binarize(mask: PILImage.Image) -> PILImage.Image:
    """Make each pixel of a mask black or white."""
    return mask.point([255 * (value >= 128) for value in range(256)])
