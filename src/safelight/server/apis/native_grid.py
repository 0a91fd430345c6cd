"""The route for grids: one request, varied along one or two fields."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from pydantic import Field as FieldOf

from safelight.assembly.services import Services
from safelight.errors import RequestError
from safelight.request.grid import AXES, axis, cells
from safelight.server import intake
from safelight.server.access import Who
from safelight.server.apis.native_fields import Generation
from safelight.server.problems import documented

AxisText = Annotated[str, FieldOf(max_length=10_000)]


class GridAsked(BaseModel):
    """A request and what varies: ``NAME=V1,V2,…``, as ``safelight grid`` takes it. ``0..1/0.25`` is a range.

    ``x``: from left to right. ``y``: from top to bottom; empty for one row.
    """

    model_config = ConfigDict(extra="forbid")

    request: Generation
    x: AxisText
    y: AxisText = ""


class GridCell(BaseModel):
    """A place of the grid, counted from 0, and the job whose image belongs there."""

    column: int
    row: int
    job: str


class GridModel(BaseModel):
    """A grid whose jobs are queued.

    ``columns``, ``rows``: the values as they were written. ``cells``: in the order of the queue.
    """

    x: str
    y: str
    columns: list[str]
    rows: list[str]
    cells: list[GridCell]


class GridRoutes:
    """The route for grids."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/grid/fields", tags=["jobs"])(self.fields)
        api.post("/grid", tags=["jobs"], status_code=202, responses=documented(404, 409, 429))(self.queue)

    def fields(self) -> list[str]:
        """List what a grid may vary."""
        return list(AXES)

    def queue(self, asked: GridAsked, who: Who) -> GridModel:
        """Queue a job for each cell of a grid, all or none, in the order with the fewest switches of models.

        All cells have the same seed, unless it is what varies.
        """
        across, down = axis("x", asked.x), axis("y", asked.y) if asked.y else None
        request = intake.request_of(self._control, asked.request.request_fields())
        found = cells(request, across, down)
        for cell in found:
            if cell.request.count != 1:
                raise RequestError("count", cell.request.count, "a cell of a grid is one image")
        requests, priority = [cell.request for cell in found], asked.request.priority
        jobs = intake.accept(self._control, *requests, who=who, client="api", priority=priority)
        return GridModel(
            x=across.name,
            y="" if down is None else down.name,
            columns=list(across.values),
            rows=[] if down is None else list(down.values),
            cells=[
                GridCell(column=cell.column, row=cell.row, job=job.id) for cell, job in zip(found, jobs, strict=True)
            ],
        )
