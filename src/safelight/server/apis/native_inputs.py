"""Routes for input images: pictures that requests start from, masks, and pictures for ControlNets."""

from __future__ import annotations

import io
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.server import intake
from safelight.server.access import Who
from safelight.server.problems import documented

Digest = Annotated[str, InPath(pattern="^[0-9a-f]{64}$", description="an input image's digest")]

PNG = {200: {"content": {"image/png": {}}, "description": "the picture"}}


class InputToStore(BaseModel):
    """A picture file in base64, with or without ``data:image/…;base64,``.

    ``field``: what it is for. A mask is read as lightness times alpha; white areas are drawn again.
    """

    model_config = ConfigDict(extra="forbid")

    image: str
    field: Literal["image", "mask", "controls", "references"] = "image"


class InputModel(BaseModel):
    """A stored picture. Requests name it by ``digest``. ``width``, ``height``: in pixels."""

    digest: str
    width: int
    height: int


class InputRoutes:
    """The routes for input images."""

    def __init__(self, control: Services) -> None:
        self._control, self._inputs = control, control.catalog.inputs

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/inputs", tags=["jobs"], status_code=201, responses=documented())(self.store)
        api.get("/inputs/{digest}", tags=["jobs"], response_class=Response, responses={**PNG, **documented(404)})(
            self.one
        )

    def store(self, asked: InputToStore, who: Who) -> InputModel:
        """Store a picture. Pictures that no job and no image names are removed after a day."""
        text = asked.image if asked.image.startswith("data:") else f"data:image/png;base64,{asked.image}"
        intake.check_disk(self._control, who)
        digest = self._inputs.store_from_request(asked.field, text, by_path=False)
        self._control.database.input_owners.add(who.name, [digest])
        width, height = self._inputs.size(digest)
        return InputModel(digest=digest, width=width, height=height)

    def one(self, digest: Digest, who: Who) -> Response:
        """Return a stored picture that one has sent, or from which an image was made that one sees."""
        intake.own_input(self._control, who, digest)
        out = io.BytesIO()
        self._inputs.open(digest).save(out, "PNG", compress_level=1)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(out.getvalue(), media_type="image/png", headers=headers)
