"""The pictures that a request names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from safelight.request.schema import Request

PICTURE_FIELDS = ("image", "mask")
"""The fields of a request that name one picture."""

PICTURE_LISTS = ("references", "controls")
"""The fields of a request that name several. A reference is a picture; a control has it in its field ``image``."""


def pictures_of(request: Request) -> list[tuple[str, str]]:
    """Return the pictures of a request, each with its field: a digest, ``data:image/…``, or a path."""
    named = [("image", request.image), ("mask", request.mask)]
    named += [("references", picture) for picture in request.references]
    named += [("controls", control.image) for control in request.controls]
    return [(field, picture) for field, picture in named if picture]


def with_pictures(request: Request, change: Callable[[str, str], str]) -> Request:
    """Return the request with other pictures. ``change``: returns one, for the field and the picture of before."""
    if not pictures_of(request):
        return request
    return replace(
        request,
        image=request.image and change("image", request.image),
        mask=request.mask and change("mask", request.mask),
        references=tuple(change("references", picture) for picture in request.references),
        controls=tuple(
            replace(control, image=change("controls", control.image)) if control.image else control
            for control in request.controls
        ),
    )
