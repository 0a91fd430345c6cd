"""Routes that say what a request would cost, and show what a ControlNet would see, before anything is queued."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.catalog.cards import Card
from safelight.errors import WorkerDiedError
from safelight.families.registry import families
from safelight.pipeline.preprocess import preprocess
from safelight.queue.person import Person
from safelight.queue.timings import Basis, Known, known
from safelight.request.adapters import Control
from safelight.request.field import fields_of
from safelight.request.schema import Request
from safelight.resolve.resolve import with_defaults_of
from safelight.server import bridge, intake
from safelight.server.access import Who
from safelight.server.apis.native_fields import Generation
from safelight.server.apis.native_inputs import PNG
from safelight.server.problems import documented

FITS_SECONDS = 2.0
"""Seconds that the answer waits for the worker's report. Without it, the answer has no memory."""


class MemoryEstimate(BaseModel):
    """What a component of the model needs, in bytes.

    ``total``: of its weights. ``resident``: of these, what would stay in memory. ``streamed``: what would be read at
    each use. ``working``: for activations.
    """

    component: str
    total: int
    resident: int
    streamed: int
    working: int


class Estimate(BaseModel):
    """What a request would take on this machine.

    ``switch_seconds``: until the model's weights are in memory; null if nothing is known.
    ``image_seconds``: for each image; null if nothing is known.
    ``seconds``: for all images of the request, with the switch.
    ``basis``: what ``image_seconds`` was derived from; empty if nothing is known.
    ``fits``: whether the model fits in memory now; null if the worker cannot say it now.
    ``summary``: the same in words.
    """

    model: str
    count: int
    switch_seconds: float | None
    image_seconds: float | None
    seconds: float | None
    basis: Basis
    fits: bool | None
    summary: str
    memory: list[MemoryEstimate]


class PreprocessorAsked(BaseModel):
    """A stored picture and the preprocessor to apply, with its thresholds (see the fields of a ControlNet)."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[str, FieldOf(pattern="^[0-9a-f]{64}$")]
    preprocessor: str
    low: int = fields_of(Control)["low"].default
    high: int = fields_of(Control)["high"].default


class EstimateRoutes:
    """The routes for estimates and previews."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/estimate", tags=["jobs"], responses=documented(404))(self.estimate)
        api.post("/preprocess", tags=["jobs"], response_class=Response, responses={**PNG, **documented(404)})(
            self.preprocess
        )

    async def estimate(self, asked: Generation) -> Estimate:
        """Predict the time and memory of a request. Nothing is queued.

        Times are derived from the images that this server has made. Memory is what the worker would plan now.
        """
        card, request = await bridge.run(self._request, asked)
        side = request.width or card.summary["resolution"], request.height or card.summary["resolution"]
        found = self._control.timings.predict(
            known(card),
            await bridge.run(self._all_known),
            request,
            side[0] * side[1],
            any(card.digest in slot.runner.resident for slot in self._control.dispatcher.slots),
        )
        fits = await self._fits(card, request) if card.digest else None
        each = found.image
        return Estimate(
            model=card.name,
            count=request.count,
            switch_seconds=found.switch,
            image_seconds=each,
            seconds=None if each is None else each * request.count + (found.switch or 0.0),
            basis=found.basis,
            fits=None if fits is None else fits["fits"],
            summary="" if fits is None else fits["summary"],
            memory=[] if fits is None else [MemoryEstimate(**_numbers(one)) for one in fits["components"]],
        )

    async def preprocess(self, asked: PreprocessorAsked, who: Who) -> Response:
        """Return what a preprocessor makes of a stored picture, for a ControlNet."""
        return await bridge.long(self._preprocess, asked, who)

    def _preprocess(self, asked: PreprocessorAsked, who: Person) -> Response:
        inputs = self._control.catalog.inputs
        intake.own_input(self._control, who, asked.image)
        control = Control("preview", asked.image, preprocessor=asked.preprocessor, low=asked.low, high=asked.high)
        out = io.BytesIO()
        made: PILImage.Image = preprocess(inputs.open(asked.image), control)
        made.save(out, "PNG", compress_level=1)
        return Response(out.getvalue(), media_type="image/png")

    def _request(self, asked: Generation) -> tuple[Card, Request]:
        """Return the model's card, and the request with the model's defaults. No weights are read."""
        request = intake.request_of(self._control, asked.request_fields())
        card = self._control.catalog.model_card(request.model)
        family, user = families()[card.summary["base"]], card.summary["defaults"]
        sides = {side: getattr(request, side) or user.get(side) for side in ("width", "height")}
        return card, replace(with_defaults_of(request, user, family, card.summary["variant"]), **sides)

    def _all_known(self) -> list[Known]:
        return [known(card) for card in self._control.library.cards()]

    async def _fits(self, card: Card, request: Request) -> dict[str, Any] | None:
        first = self._control.dispatcher.slots[0]
        asked = first.supervisor.ask("fits", card.name, request)
        with contextlib.suppress(WorkerDiedError, TimeoutError, RuntimeError):
            return await bridge.long(asked.result, FITS_SECONDS)
        return None


def _numbers(component: dict[str, Any]) -> dict[str, Any]:
    return {name: component[name] for name in MemoryEstimate.model_fields}
