"""Routes that describe the server in A1111's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.errors import WorkerDiedError
from safelight.server import auth
from safelight.server.problems import RefusedError


class ServerRoutes:
    """The routes for the server's address and memory."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter, outside: APIRouter) -> None:
        """Add the routes. ``outside``: the router of the paths that A1111 has outside ``/sdapi/v1``."""
        api.get("/cmd-flags")(self.cmd_flags)
        api.get("/memory")(self.memory)
        outside.get("/internal/ping", tags=["AUTOMATIC1111"])(self.ping)

    def cmd_flags(self) -> dict[str, Any]:
        """Return the address on which the server listens, as AUTOMATIC1111's flags."""
        settings = self._control.settings
        return {"api": True, "listen": not auth.is_loopback(settings.host), "port": settings.port}

    def memory(self) -> dict[str, Any]:
        """Return the memory in A1111's form. Sizes are in bytes."""
        try:
            places = self._control.supervisor.ask("memory").result(30)["places"]
        except (WorkerDiedError, TimeoutError, RuntimeError) as error:
            raise RefusedError(503, "worker_not_ready", str(error)) from error
        sizes = {
            place: {"free": v["budget"] - v["stored"] - v["promised"], "used": v["stored"], "total": v["budget"]}
            for place, v in places.items()
        }
        host = sizes.pop("host")
        return {"ram": host, "cuda": next(iter(sizes.values()), {"error": "unavailable"})}

    def ping(self) -> dict[str, Any]:
        """Answer that the server is running."""
        return {}
