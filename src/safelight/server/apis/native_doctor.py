"""Routes for the doctor: whether anything on this machine spoils images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from safelight.assembly.services import Services
from safelight.server.problems import documented


class Examination(BaseModel):
    """The last examination.

    ``started``, ``ended``: in seconds since 1970.
    ``report``: the findings, each with its evidence and what to do; null until it ended.
    ``problem``: why there is no report.
    """

    state: Literal["never", "running", "done", "failed"]
    started: float | None
    ended: float | None
    report: dict[str, Any] | None
    problem: str


class DoctorRoutes:
    """The routes for the doctor."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/doctor", tags=["server"])(self.last)
        api.post("/doctor", tags=["server"], status_code=202, responses=documented())(self.examine)

    def last(self) -> Examination:
        """Return the last examination since the server started."""
        return Examination(**asdict(self._control.examinations.state))

    def examine(self) -> Examination:
        """Examine this machine and all its models, as ``safelight doctor`` does. It takes minutes."""
        return Examination(**asdict(self._control.examinations.start()))
