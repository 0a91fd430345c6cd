"""What an image is made over: the picture that it starts from, the mask, and how the result is put back.

White in a mask is drawn anew. Outside of it the picture's own pixels stay, exactly; ``mask_blur`` softens the border.
With ``mask_padding`` only the masked part is drawn, with so many pixels around it, at the whole size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageFilter

from safelight.arch.diffusers_fence import pictures
from safelight.errors import RequestError
from safelight.library.inputs import Inputs
from safelight.types import Request

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
    if not request.mask:
        picture = _resized(given, size)
        return Canvas(picture, None, picture, None, (0, 0, width, height))
    whole = _resized(given, size) if request.mask_padding is None else given
    mask = _sharp(_resized(inputs.open(request.mask).convert("L"), whole.size))
    if mask.getbbox() is None:
        raise RequestError("mask", request.mask[:16], "nothing in it is white: nothing would be drawn")
    soft = mask.filter(ImageFilter.GaussianBlur(request.mask_blur)) if request.mask_blur else mask
    if request.mask_padding is None:
        return Canvas(whole, mask, whole, soft, (0, 0, width, height))
    box = pictures.crop_region(mask, width, height, request.mask_padding)
    picture, part = (_resized(image.crop(box), size) for image in (whole, mask))
    return Canvas(picture, part, whole, soft, box)


def _resized(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    return image if image.size == size else image.resize(size, PILImage.Resampling.LANCZOS)


def _sharp(mask: PILImage.Image) -> PILImage.Image:
    return mask.point([255 * (value >= 128) for value in range(256)])
