"""Stores the pictures that a request starts from, and finds the size to draw. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safelight.catalog.inputs import Inputs
from safelight.catalog.model import Model
from safelight.errors import RequestError
from safelight.families.references import References, Size
from safelight.request.bounds import MOST_PIXELS
from safelight.request.schema import Request

MAX_ASPECT_RATIO_DIFFERENCE = 0.03
"""By how much a mask's aspect ratio may differ from the image's: rounding changes the ratio of small pictures."""


def resolve_pictures(request: Request, inputs: Inputs, by_path: bool, model: Model) -> dict[str, Any]:
    """Return the fields of a request that its pictures decide: the digests of all pictures, and the size to draw.

    ``by_path``: the request may name pictures by their paths.
    Raises RequestError for a file that is not a picture, is too large, or has a size that the model cannot take.
    """
    resolved_fields: dict[str, Any] = {
        field: inputs.store_from_request(field, value, by_path)
        for field, value in (("image", request.image), ("mask", request.mask))
        if value
    }
    multiple, references = model.family.latents.multiple, model.family.references_of(model.variant)
    digests = tuple(inputs.store_from_request("references", value, by_path) for value in request.references)
    if digests:
        resolved_fields["references"] = digests
    if digests and references is not None:
        shown = _encoded_sizes([inputs.size(digest) for digest in digests], references)
        if not request.image:
            sides = [max(multiple, side // multiple * multiple) for side in shown[references.sets_size]]
            resolved_fields |= {"width": request.width or sides[0], "height": request.height or sides[1]}
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


def _encoded_sizes(sizes: Sequence[Size], references: References) -> list[Size]:
    """Return the sizes in which the VAE encodes pictures. Raises RequestError for one that the model cannot take."""
    for number, (width, height) in enumerate(sizes, 1):
        what = f"{width}x{height}"
        if min(width, height) < references.least_side:
            problem = f"picture {number} is too small: each side must have at least {references.least_side} pixels"
            raise RequestError("references", what, problem)
        if max(width / height, height / width) > references.most_ratio:
            problem = f"picture {number} is too long: one side may be at most {references.most_ratio:g} times the other"
            raise RequestError("references", what, problem)
    return [references.size(size) for size in sizes]


def _refuse_other_shape(name: str, mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise RequestError for a mask with another aspect ratio than the image: it probably belongs to another image.

    Another size is allowed.
    """
    if abs(mask[0] * image[1] - mask[1] * image[0]) > MAX_ASPECT_RATIO_DIFFERENCE * mask[1] * image[0]:
        problem = f"is {mask[0]}x{mask[1]}, which is not the shape of the image, {image[0]}x{image[1]}"
        raise RequestError("mask", name[:80], problem)
