"""Routes that say whether images are right: the doctor, soaks, canaries, and the repairs so far."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf
from starlette.responses import FileResponse, Response

from safelight.assembly.command_run import CommandState
from safelight.assembly.services import Services
from safelight.devices import measurements
from safelight.diagnostics.canary_file import Canary, read_canaries
from safelight.server.apis.native_inputs import PNG
from safelight.server.problems import RefusedError, documented

MOST_SOAK_IMAGES = 100_000


class Examination(BaseModel):
    """What to examine. ``soak_images``: first switch between all models at random, for so many images; 0 for none."""

    model_config = ConfigDict(extra="forbid")

    soak_images: int = FieldOf(default=0, ge=0, le=MOST_SOAK_IMAGES)


class CanaryModel(BaseModel):
    """The canaries of a model: a tiny image, made in a process that held no other model.

    ``first``, ``last``: when the first and the last one were made, in seconds since 1970.
    ``count``: how many there are, of all run settings and versions.
    ``same``: whether all of them have the same pixels.
    ``picture``: the last one, as a data URL.
    """

    model: str
    first: float
    last: float
    count: int
    same: bool
    pixels_sha256: str
    picture: str


class TrustModel(BaseModel):
    """What says that images are right.

    ``repairs``: how often each repair helped.
    ``soak_plot``: the path of the last soak's diagram on this server; empty if there was none.
    """

    canaries: list[CanaryModel]
    repairs: dict[str, Any]
    soak_plot: str


class DoctorRoutes:
    """The routes for the doctor and what else says that images are right."""

    def __init__(self, control: Services) -> None:
        self._control = control
        self._plot = control.settings.root / "soak.png"

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/doctor", tags=["server"])(self.last)
        api.post("/doctor", tags=["server"], status_code=202, responses=documented())(self.examine)
        api.get("/doctor/soak.png", tags=["server"], response_class=Response, responses={**PNG, **documented(404)})(
            self.plot
        )
        api.get("/trust", tags=["server"])(self.trust)

    def last(self) -> CommandState:
        """Return the last examination since the server started."""
        return self._control.doctor.state

    def examine(self, asked: Examination | None = None) -> CommandState:
        """Examine this machine and all its models, as ``safelight doctor`` does. It takes minutes."""
        images = 0 if asked is None else asked.soak_images
        soak = ("--soak", str(images), "--plot", str(self._plot)) if images else ()
        return self._control.doctor.start("doctor", *soak, about={"soak_images": images})

    def plot(self) -> Response:
        """Return the diagram of the last soak: memory and switch times."""
        if not self._plot.is_file():
            raise RefusedError(404, "not_found", "there was no soak yet")
        return FileResponse(self._plot, media_type="image/png", headers={"Cache-Control": "no-cache"})

    def trust(self) -> TrustModel:
        """Return the canaries of all models, and the repairs so far."""
        root = self._control.settings.root
        found = [(card.name, read_canaries(root, card.digest)) for card in self._control.library.cards() if card.digest]
        return TrustModel(
            canaries=[_describe(name, canaries) for name, canaries in found if canaries],
            repairs=dict(measurements.everything(root / "repairs.json")),
            soak_plot="/api/v1/doctor/soak.png" if self._plot.is_file() else "",
        )


def _describe(name: str, canaries: list[Canary]) -> CanaryModel:
    last = canaries[-1]
    return CanaryModel(
        model=name,
        first=canaries[0].made,
        last=last.made,
        count=len(canaries),
        same=len({one.pixels_sha256 for one in canaries}) == 1,
        pixels_sha256=last.pixels_sha256,
        picture=f"data:image/png;base64,{last.png}",
    )
