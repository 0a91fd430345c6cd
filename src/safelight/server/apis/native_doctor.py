"""Routes for the doctor: whether anything on this machine spoils images."""

from __future__ import annotations

from fastapi import APIRouter

from safelight.assembly.examination import ExaminationState
from safelight.assembly.services import Services
from safelight.server.problems import documented


class DoctorRoutes:
    """The routes for the doctor."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/doctor", tags=["server"])(self.last)
        api.post("/doctor", tags=["server"], status_code=202, responses=documented())(self.examine)

    def last(self) -> ExaminationState:
        """Return the last examination since the server started."""
        return self._control.examinations.state

    def examine(self) -> ExaminationState:
        """Examine this machine and all its models, as ``safelight doctor`` does. It takes minutes."""
        return self._control.examinations.start()
