"""The route that says whether the server works."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HTTPRequest

from safelight.assembly.services import Services
from safelight.server import auth
from safelight.server.apis.native_fields import Health
from safelight.version import VERSION


class HealthRoutes:
    """The route of the server's health; it is open to everyone."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the route to a router."""
        api.get("/health", tags=["server"])(self.health)

    def health(self, http: HTTPRequest) -> Health:
        """Say whether the server and its worker are running. Clients with access also learn the details."""
        run = self._control.supervisor.run_settings(0.0)
        trouble = self._control.dispatcher.trouble
        status, worker = "waiting" if trouble else "ok", "ready" if run is not None else "starting"
        if not auth.may_use(http, self._control.settings):
            return Health(status=status, worker=worker)
        return Health(
            status=status,
            worker=worker,
            problem=trouble,
            version=VERSION,
            spare=self._control.supervisor.spare_is_ready(),
            restarts=self._control.supervisor.restarts,
            run=dict(run) if run is not None else None,
        )
