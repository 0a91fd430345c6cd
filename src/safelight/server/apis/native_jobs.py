"""Routes for jobs: queueing a request, the jobs and their order, and events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HTTPRequest
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from safelight.assembly.services import Services
from safelight.queue.descriptions import job_to_dict, progress_to_dict
from safelight.queue.events import Event
from safelight.queue.job import QueuedJob, State
from safelight.queue.person import Person
from safelight.server import bridge, event_stream, intake
from safelight.server.access import Who
from safelight.server.apis.native_fields import (
    CancelledModel,
    Generation,
    JobId,
    JobModel,
    Limit,
    Order,
    Place,
    Priority,
    Queue,
    Queued,
    RunningModel,
)
from safelight.server.apis.native_image_fields import IdsModel
from safelight.server.problems import RefusedError, documented

STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}
}
"""The description of a stream of events in the OpenAPI document."""

CHECK_SECONDS = 5.0
"""Before an event is sent, the rights of who listens are checked again if the last check is older than this."""

MOST_PLACES = 200
"""Places of the queue that are listed."""


class JobRoutes:
    """The routes for jobs."""

    def __init__(self, control: Services) -> None:
        self._control = control
        self._database, self._dispatcher = control.database, control.dispatcher

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.post("/generate", status_code=202, tags=["jobs"], responses=documented(404, 409, 429))(self.generate)
        api.get("/jobs", tags=["jobs"])(self.jobs)
        api.get("/jobs/{job_id}", tags=["jobs"], responses=documented(404))(self.one_job)
        api.post("/jobs/{job_id}/cancel", tags=["jobs"], responses=documented(404))(self.cancel)
        api.patch("/jobs/{job_id}", tags=["jobs"], responses=documented(404, 409))(self.set_priority)
        api.post("/queue/cancel", tags=["jobs"])(self.cancel_waiting)
        api.get("/queue", tags=["jobs"])(self.queue)
        api.put("/queue/order", tags=["jobs"])(self.set_order)
        api.get("/events", tags=["jobs"], response_class=EventSourceResponse, responses=STREAM)(self.events)

    async def generate(self, asked: Generation, who: Who) -> Queued:
        """Queue a request, and return the job at once.

        If a prompt contains choices (``{a|b}``), each image is a job of its own. With ``spread``, each slot gets a part
        of the images as a job. The answer is the first job, and has the identifiers of all.
        """
        # FastAPI would use a thread for a plain function, and then another one for its answer.
        return await bridge.run(self._queue_request, asked, who)

    def _queue_request(self, asked: Generation, who: Person) -> Queued:
        request = intake.request_of(self._control, asked.request_fields())
        jobs = intake.accept(
            self._control, request, who=who, client="api", priority=asked.priority, spread=asked.spread
        )
        return Queued(**job_to_dict(jobs[0]), jobs=[job.id for job in jobs])

    def jobs(
        self,
        who: Who,
        state: Annotated[list[State] | None, Query()] = None,
        limit: Limit = 100,
        before: Annotated[int | None, Query(ge=0, le=2**53, description="only jobs with a smaller number")] = None,
    ) -> list[JobModel]:
        """List the jobs, the newest first. Administrators see everybody's."""
        return [_job(job) for job in self._database.jobs(state or (), limit, before, who)]

    async def one_job(self, job_id: JobId, who: Who) -> JobModel:
        """Return a job."""
        return _job(await bridge.run(intake.own_job, self._control, who, job_id))

    def cancel(self, job_id: JobId, who: Who) -> CancelledModel:
        """Cancel a job. A waiting job ends at once, a running one at its next step."""
        intake.own_job(self._control, who, job_id)
        return CancelledModel(cancelled=self._dispatcher.cancel(job_id))

    def set_priority(self, job_id: JobId, asked: Priority, who: Who) -> JobModel:
        """Set the priority of a job that waits. Higher goes first among its person's jobs, within the queue's bound."""
        job = intake.own_job(self._control, who, job_id)
        if not self._dispatcher.set_priorities({job_id: asked.priority}):
            raise RefusedError(409, "not_waiting", f"job {job_id} is {job.state}; only jobs that wait have an order")
        return _job(intake.own_job(self._control, who, job_id))

    def cancel_waiting(
        self,
        who: Who,
        everybody: Annotated[bool, Query(description="also other people's, for administrators")] = False,
    ) -> IdsModel:
        """Cancel all your waiting jobs. The running one goes on."""
        if everybody and not who.sees_all:
            raise RefusedError(403, "forbidden", "only administrators cancel other people's jobs", "everybody")
        return IdsModel(ids=self._dispatcher.cancel_waiting(None if everybody else who.name))

    def set_order(self, asked: Order, who: Who) -> IdsModel:
        """Set the order of your waiting jobs: each gets a higher priority than the next one.

        Other jobs come after them. Returns the identifiers of the jobs that did wait.
        """
        count, jobs = len(asked.ids), self._database.jobs_of(asked.ids)
        own = {job for job in asked.ids if job in jobs and who.owns(jobs[job].person)}
        order = {job: count - at for at, job in enumerate(asked.ids) if job in own}
        return IdsModel(ids=self._dispatcher.set_priorities(order))

    def queue(self, who: Who, limit: Annotated[int, Query(ge=1, le=MOST_PLACES)] = 50) -> Queue:
        """Return the running jobs, and the waiting jobs in their order, each with the reason for its place.

        Jobs of other people are only counted, except for administrators.
        """
        running = self._dispatcher.running()
        waiting = self._dispatcher.queue(limit if who.sees_all else MOST_PLACES)
        own = [(place, job, reason) for place, (job, reason) in enumerate(waiting) if who.owns(job.person)][:limit]
        return Queue(
            running=[
                RunningModel(slot=slot, job=_job(one.job), progress=one.progress and progress_to_dict(one.progress))
                for slot, one in running.items()
                if who.owns(one.job.person)
            ],
            waiting=[Place(job=_job(job), place=place, reason=reason) for place, job, reason in own],
            others_running=sum(not who.owns(one.job.person) for one in running.values()),
            others_waiting=0 if who.sees_all else self._database.queued() - self._database.queued(who.name),
        )

    async def events(
        self, http: HTTPRequest, who: Who, job: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None
    ) -> EventSourceResponse:
        """Send server-sent events: ``job``, ``progress``, ``image``, ``images`` (changed or deleted), ``boards``,
        ``presets``, ``memory``, ``worker``, ``download``, ``models`` (the library changed), ``doctor``, ``compacting``.

        With ``job``, send the events of this job until it ends; otherwise send all events. Those of other people's jobs
        and images go only to administrators. The stream ends when its person has logged out, or has another role.
        """
        return event_stream.answer(_stream(self._control, job, who, partial(http.app.state.access.still, http)))


def _job(job: QueuedJob) -> JobModel:
    return JobModel(**job_to_dict(job))


async def _stream(
    control: Services, job_id: str | None, who: Person, still: Callable[[], bool]
) -> AsyncGenerator[ServerSentEvent]:
    async with bridge.listening(control.events, job_id, who) as arrived:
        if job_id is not None:
            job = await bridge.run(control.database.job, job_id)
            if job is None or not who.owns(job.person):
                return
            yield _encode(Event("job", job.id, job_to_dict(job)))
            if job.ended is not None:
                return
        checked = time.monotonic()
        while True:
            event = await arrived.get()
            if time.monotonic() - checked > CHECK_SECONDS:
                if not await bridge.run(still):
                    return
                checked = time.monotonic()
            yield _encode(event)
            if job_id is not None and event.kind == "job" and event.data["ended"] is not None:
                return


def _encode(event: Event) -> ServerSentEvent:
    data: Mapping[str, Any] = {"job": event.job, **event.data}
    return event_stream.event(event.kind, json.dumps(data, ensure_ascii=False, default=str))
