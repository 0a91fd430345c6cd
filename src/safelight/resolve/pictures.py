"""Stores the pictures that a request starts from, and finds the size to draw. No torch."""

from __future__ import annotations

from typing import Any

from safelight.catalog.inputs import Inputs
from safelight.errors import RequestError
from safelight.request.bounds import MOST_PIXELS
from safelight.request.schema import Request

MAX_ASPECT_RATIO_DIFFERENCE = 0.03
"""By how much a mask's aspect ratio may differ from the image's: rounding changes the ratio of small pictures."""


def resolve_pictures(request: Request, inputs: Inputs, by_path: bool, multiple: int) -> dict[str, Any]:
    """Return the fields of a request that its pictures decide: digests of image and mask, and the size to draw.

    ``by_path``: the request may name pictures by their paths.
    ``multiple``: the sides of the image are multiples of this, in pixels.
    Raises RequestError for a file that is not a picture or is too large.
    """
    resolved_fields: dict[str, Any] = {
        field: inputs.store_from_request(field, value, by_path)
        for field, value in (("image", request.image), ("mask", request.mask))
        if value
    }
    if not request.image:
        return resolved_fields
    width, height = inputs.size(resolved_fields["image"])
    if request.mask:
        _refuse_other_shape(request.mask, inputs.size(resolved_fields["mask"]), (width, height))
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    if request.outpaint:
        # Extend right and bottom to a multiple of ``multiple``, so that the input image is not resized.
        right, bottom = right + -(left + width + right) % multiple, bottom + -(top + height + bottom) % multiple
        resolved_fields["outpaint"] = (left, top, right, bottom)
    whole = left + width + right, top + height + bottom
    if whole[0] * whole[1] > MOST_PIXELS:
        raise RequestError("outpaint", request.outpaint, f"makes the image over {MOST_PIXELS} pixels")
    if request.mask_padding is None:
        sides = [max(multiple, side // multiple * multiple) for side in whole]
        resolved_fields |= {"width": request.width or sides[0], "height": request.height or sides[1]}
    return resolved_fields


def _refuse_other_shape(name: str, mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise RequestError for a mask with another aspect ratio than the image: it probably belongs to another image.

    Another size is allowed.
    """
    if abs(mask[0] * image[1] - mask[1] * image[0]) > MAX_ASPECT_RATIO_DIFFERENCE * mask[1] * image[0]:
        problem = f"is {mask[0]}x{mask[1]}, which is not the shape of the image, {image[0]}x{image[1]}"
        raise RequestError("mask", name[:80], problem)
