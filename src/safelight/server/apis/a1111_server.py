"""Routes that describe the server in A1111's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from safelight.assembly.services import Services
from safelight.errors import WorkerDiedError
from safelight.server import auth, intake
from safelight.server.problems import RefusedError
from safelight.workers.messages import Command
from safelight.workers.slot import Slot

ANSWER_SECONDS = 120.0
"""The worker answers within this time; loading a model takes the longest."""


class ServerRoutes:
    """The routes for the server's address and memory."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter, outside: APIRouter) -> None:
        """Add the routes. ``outside``: the router of the paths that A1111 has outside ``/sdapi/v1``."""
        api.get("/cmd-flags")(self.cmd_flags)
        api.get("/memory")(self.memory)
        api.post("/unload-checkpoint")(self.unload_checkpoint)
        api.post("/reload-checkpoint")(self.reload_checkpoint)
        api.post("/interrogate")(self.interrogate)
        outside.get("/internal/ping", tags=["AUTOMATIC1111"])(self.ping)

    def cmd_flags(self) -> dict[str, Any]:
        """Return the address on which the server listens, as AUTOMATIC1111's flags."""
        settings = self._control.settings
        return {"api": True, "listen": not auth.is_loopback(settings.host), "port": settings.port}

    def memory(self) -> dict[str, Any]:
        """Return the memory in A1111's form. Sizes are in bytes."""
        [first, *_] = self._control.dispatcher.slots
        places = self._ask(first, "memory", "")["places"]
        sizes = {
            place: {"free": v["budget"] - v["stored"] - v["promised"], "used": v["stored"], "total": v["budget"]}
            for place, v in places.items()
        }
        host = sizes.pop("host")
        return {"ram": host, "cuda": next(iter(sizes.values()), {"error": "unavailable"})}

    def unload_checkpoint(self) -> dict[str, Any]:
        """Free the memory of all models that are not pinned, unless a job uses them."""
        for slot in self._control.dispatcher.slots:
            self._ask(slot, "unload", "")
        return {}

    def reload_checkpoint(self) -> dict[str, Any]:
        """Load the model that clients use who name none. The next request would do so, too."""
        [first, *_] = self._control.dispatcher.slots
        self._ask(first, "load", intake.default_model(self._control).name)
        self._control.dispatcher.note_loading()
        return {}

    def interrogate(self) -> dict[str, Any]:
        """Refuse: Safelight has no model that describes pictures."""
        problem = "Safelight has no model that describes pictures (CLIP interrogator, DeepBooru)"
        raise RefusedError(422, "not_supported", problem)

    def _ask(self, slot: Slot, command: Command, model: str) -> Any:
        try:
            return slot.supervisor.ask(command, model).result(ANSWER_SECONDS)
        except (WorkerDiedError, TimeoutError, RuntimeError) as error:
            raise RefusedError(503, "worker_not_ready", str(error)) from error

    def ping(self) -> dict[str, Any]:
        """Answer that the server is running."""
        return {}
