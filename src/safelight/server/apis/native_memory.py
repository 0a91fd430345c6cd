"""Routes for the worker's memory: what it holds, and loading, evicting and pinning a model."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import APIRouter, Query

from safelight.assembly.services import Services
from safelight.errors import WorkerDiedError
from safelight.server import bridge
from safelight.server.apis.native_fields import ResidentModel
from safelight.server.problems import RefusedError, documented
from safelight.workers.messages import Command
from safelight.workers.slot import Slot

ANSWER_SECONDS = 120.0
"""Seconds that the server waits for an answer of the worker, for example while it loads a model."""


SlotName = Annotated[str, Query(description="a slot; by default the first one, and for evicting all of them")]


class MemoryRoutes:
    """The routes for the worker's memory."""

    def __init__(self, control: Services) -> None:
        self._control = control

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/models/{name}/load", tags=["models"], responses=documented(404, 409, 503))(self.load)
        api.post("/models/{name}/unload", tags=["models"], responses=documented(404, 409, 503))(self.unload)
        api.post("/models/{name}/pin", tags=["models"], responses=documented(404, 409, 503))(self.pin)
        api.post("/models/{name}/unpin", tags=["models"], responses=documented(404, 409, 503))(self.unpin)
        api.get("/memory", tags=["server"], responses=documented(404, 409, 503))(self.memory)

    async def load(self, name: str, slot: SlotName = "") -> ResidentModel:
        """Load a model into memory, as far as it fits."""
        return await self._ask("load", name, slot)

    async def unload(self, name: str, slot: SlotName = "") -> ResidentModel:
        """Evict a model from memory, unless a job uses it."""
        return await self._ask("unload", name, slot)

    async def pin(self, name: str, slot: SlotName = "") -> ResidentModel:
        """Load a model into memory and keep it there between jobs."""
        return await self._ask("pin", name, slot)

    async def unpin(self, name: str, slot: SlotName = "") -> ResidentModel:
        """Let a pinned model be evicted again."""
        return await self._ask("unpin", name, slot)

    async def memory(self, slot: SlotName = "") -> dict[str, Any]:
        """Return the budgets, the resident models and their leases, and the last plan with its reasons.

        Sizes are in bytes.
        """
        return dict(await bridge.long(_wait, self._slot(slot).supervisor.ask("memory")))

    async def _ask(self, command: Command, name: str, slot: str) -> ResidentModel:
        model = await bridge.run(self._control.library.get, name)
        argument = model.digest if command == "unload" else model.name
        chosen = [self._slot(slot)] if slot or command in ("load", "pin") else list(self._control.dispatcher.slots)
        resident: list[str] = []
        for one in chosen:
            resident += await bridge.long(_wait, one.supervisor.ask(command, argument))
        if command == "load":
            self._control.dispatcher.note_loading()
        return ResidentModel(resident=list(dict.fromkeys(resident)))

    def _slot(self, name: str) -> Slot:
        """Return a slot; the first one for "". Raises RefusedError if there is none of this name."""
        found = self._control.dispatcher.slot(name) if name else self._control.dispatcher.slots[0]
        if found is None:
            raise RefusedError(404, "not_found", f"there is no slot {name!r}")
        return found


def _wait(future: Future[Any]) -> Any:
    try:
        return future.result(ANSWER_SECONDS)
    except (WorkerDiedError, TimeoutError) as error:
        raise RefusedError(503, "worker_not_ready", f"the worker did not answer: {error}") from error
    except RuntimeError as error:
        raise RefusedError(409, "failed", str(error)) from error
