"""Routes for the slots of a server, each a device with its worker, and for pausing the queue."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Path as InPath

from safelight.assembly.services import Services
from safelight.queue.events import Event
from safelight.queue.person import LOCAL, Person
from safelight.server.access import Who
from safelight.server.apis.native_fields import SlotModel
from safelight.server.problems import RefusedError, documented
from safelight.workers.slot import Slot

Name = Annotated[str, InPath(pattern=r"^[\w:.-]{1,100}$", description="a slot's name")]


class SlotRoutes:
    """The routes for slots."""

    def __init__(self, control: Services) -> None:
        self._control, self._dispatcher = control, control.dispatcher

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/slots", tags=["server"])(self.all)
        api.post("/slots/{name}/drain", tags=["server"], responses=documented(404))(self.drain)
        api.post("/slots/{name}/resume", tags=["server"], responses=documented(404))(self.resume)
        api.post("/slots/{name}/restart", tags=["server"], responses=documented(404))(self.restart)
        api.post("/queue/pause", tags=["server"], status_code=204)(self.pause)
        api.post("/queue/resume", tags=["server"], status_code=204)(self.resume_queue)

    def all(self, who: Who) -> list[SlotModel]:
        """List the slots: what each holds and does. Of other people's jobs, it says only whose they are."""
        names = self._names()
        return [describe_slot(slot, names, who) for slot in self._dispatcher.slots]

    def drain(self, name: Name) -> SlotModel:
        """Let a slot finish its job and take no more."""
        return self._drain(name, True)

    def resume(self, name: Name) -> SlotModel:
        """Let a slot take jobs again."""
        return self._drain(name, False)

    def restart(
        self,
        name: Name,
        after_job: Annotated[bool, Query(description="wait until its running job has ended")] = False,
    ) -> SlotModel:
        """Replace a slot's worker by a new process. Its running job, if it has one, is made again.

        With ``after_job``, the job ends first: asked of each slot, this renews all workers without losing any work.
        """
        slot = self._slot(name)
        if after_job:
            slot.restarts_when_free = True
            self._dispatcher.wake()
        else:
            slot.runner.replace_worker("somebody restarted the worker")
        return self._told(slot)

    def pause(self) -> None:
        """Start no more jobs. Running jobs go on, and requests are still queued."""
        self._dispatcher.pause(True)
        self._control.events.tell(Event("worker", ""))

    def resume_queue(self) -> None:
        """Start jobs again."""
        self._dispatcher.pause(False)
        self._control.events.tell(Event("worker", ""))

    def _drain(self, name: str, draining: bool) -> SlotModel:
        slot = self._slot(name)
        self._dispatcher.drain(slot, draining)
        return self._told(slot)

    def _slot(self, name: str) -> Slot:
        slot = self._dispatcher.slot(name)
        if slot is None:
            raise RefusedError(404, "not_found", f"there is no slot {name!r}")
        return slot

    def _names(self) -> dict[str, str]:
        return {card.digest: card.name for card in self._control.library.cards()}

    def _told(self, slot: Slot) -> SlotModel:
        self._control.events.tell(Event("worker", "", {"slot": slot.name}))
        # Only administrators come here.
        return describe_slot(slot, self._names(), LOCAL)


def describe_slot(slot: Slot, names: dict[str, str], who: Person) -> SlotModel:
    """Return what a person learns of a slot. ``names``: the names of the models, by their digests."""
    run: dict[str, Any] | None = None
    if (settings := slot.supervisor.run_settings(0.0)) is not None:
        run = dict(settings)
    running = slot.runner.running
    return SlotModel(
        name=slot.name,
        worker="starting" if run is None else "ready",
        draining=slot.draining,
        problem=slot.problem,
        machine=slot.supervisor.machine,
        job=running.job.id if running is not None and who.owns(running.job.person) else "",
        busy=running is not None,
        person="" if running is None else running.job.person,
        resident=[names.get(digest, digest[:12]) for digest in slot.runner.resident],
        switches=slot.switches,
        restarts=slot.supervisor.restarts,
        run=run,
    )
