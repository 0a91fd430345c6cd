"""The route that says whether the server works."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.server.access import person_of
from safelight.server.apis.native_fields import Health
from safelight.server.gate import NOBODY
from safelight.version import VERSION


class Readiness(BaseModel):
    """Whether the server can run jobs, and each slot: ``ready``, ``starting``, ``draining`` or ``waiting``."""

    ready: bool
    slots: dict[str, str]


class HealthRoutes:
    """The routes of the server's health; they are open to everyone."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the route to a router."""
        api.get("/health", tags=["server"])(self.health)
        api.get("/ready", tags=["server"], responses={503: {"model": Readiness}})(self.ready)

    def health(self, http: HTTPRequest) -> Health:
        """Say whether the server and its worker are running. Clients with access also learn the details."""
        dispatcher = self._control.dispatcher
        found = [run for slot in dispatcher.slots if (run := slot.supervisor.run_settings(0.0)) is not None]
        # Slots of other machines may also be away, or not there yet.
        problems = [slot.problem for slot in dispatcher.slots]
        trouble = dispatcher.trouble or (problems[0] if all(problems) else "")
        status, worker = "waiting" if trouble else "ok", "ready" if found else "starting"
        if person_of(http) is NOBODY:
            return Health(status=status, worker=worker)
        return Health(
            status=status,
            worker=worker,
            problem=trouble,
            version=VERSION,
            spare=all(slot.supervisor.spare_is_ready() for slot in dispatcher.slots),
            restarts=sum(slot.supervisor.restarts for slot in dispatcher.slots),
            run=dict(found[0]) if found else None,
            paused=dispatcher.paused,
        )

    def ready(self, answer: Response) -> Readiness:
        """Say whether jobs can run now: 200 if any slot takes jobs, else 503."""
        states: dict[str, str] = {}
        for slot in self._control.dispatcher.slots:
            started = slot.supervisor.run_settings(0.0) is not None
            takes = "waiting" if slot.problem else "draining" if slot.draining else "ready"
            states[slot.name] = takes if started else "starting"
        ready = "ready" in states.values() and not self._control.dispatcher.paused
        answer.status_code = 200 if ready else 503
        return Readiness(ready=ready, slots=states)
