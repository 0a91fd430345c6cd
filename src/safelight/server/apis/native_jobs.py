"""Routes for jobs: queueing a request, the jobs and their order, and events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from safelight.assembly.services import Services
from safelight.queue.descriptions import job_to_dict, progress_to_dict
from safelight.queue.events import Event
from safelight.queue.job import QueuedJob, State
from safelight.server import bridge, event_stream, intake
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
from safelight.server.problems import RefusedError, documented, found

STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}
}
"""The description of a stream of events in the OpenAPI document."""


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

    def generate(self, asked: Generation) -> Queued:
        """Queue a request, and return the job at once.

        If a prompt contains choices (``{a|b}``), each image is a job of its own. The answer is the first job, and has
        the identifiers of all.
        """
        request = intake.request_of(self._control, asked.model_dump(exclude={"priority"}))
        jobs = intake.accept(self._control, request, client="api", priority=asked.priority)
        return Queued(**job_to_dict(jobs[0]), jobs=[job.id for job in jobs])

    def jobs(
        self,
        state: Annotated[list[State] | None, Query()] = None,
        limit: Limit = 100,
        before: Annotated[int | None, Query(ge=0, le=2**53, description="only jobs with a smaller number")] = None,
    ) -> list[JobModel]:
        """List the jobs, the newest first."""
        return [_job(job) for job in self._database.jobs(state or (), limit, before)]

    def one_job(self, job_id: JobId) -> JobModel:
        """Return a job."""
        return _job(found(self._database.job(job_id), "job", job_id))

    def cancel(self, job_id: JobId) -> CancelledModel:
        """Cancel a job. A waiting job ends at once, a running one at its next step."""
        found(self._database.job(job_id), "job", job_id)
        return CancelledModel(cancelled=self._dispatcher.cancel(job_id))

    def set_priority(self, job_id: JobId, asked: Priority) -> JobModel:
        """Set the priority of a job that waits. Higher goes first, within the bound of the queue."""
        job = found(self._database.job(job_id), "job", job_id)
        if not self._dispatcher.set_priorities({job_id: asked.priority}):
            raise RefusedError(409, "not_waiting", f"job {job_id} is {job.state}; only jobs that wait have an order")
        return self.one_job(job_id)

    def cancel_waiting(self) -> IdsModel:
        """Cancel all jobs that wait. The running one goes on."""
        return IdsModel(ids=self._dispatcher.cancel_waiting())

    def set_order(self, asked: Order) -> IdsModel:
        """Set the order of waiting jobs: each gets a higher priority than the next one.

        Other jobs come after them. Returns the identifiers of the jobs that did wait.
        """
        count = len(asked.ids)
        return IdsModel(ids=self._dispatcher.set_priorities({job: count - at for at, job in enumerate(asked.ids)}))

    def queue(self, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> Queue:
        """Return the running jobs, and the waiting jobs in their order, each with the reason for its place."""
        running = self._dispatcher.running()
        return Queue(
            running=[
                RunningModel(slot=slot, job=_job(one.job), progress=one.progress and progress_to_dict(one.progress))
                for slot, one in running.items()
            ],
            waiting=[Place(job=_job(job), reason=reason) for job, reason in self._dispatcher.queue(limit)],
        )

    async def events(self, job: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None) -> EventSourceResponse:
        """Send server-sent events: ``job``, ``progress``, ``image``, ``images`` (changed or deleted), ``boards``,
        ``presets``, ``memory``, ``worker``, ``download``, ``models`` (the library changed), ``doctor``, ``compacting``.

        With ``job``, send the events of this job until it ends; otherwise send all events.
        """
        return event_stream.answer(_stream(self._control, job))


def _job(job: QueuedJob) -> JobModel:
    return JobModel(**job_to_dict(job))


async def _stream(control: Services, job_id: str | None) -> AsyncGenerator[ServerSentEvent]:
    async with bridge.listening(control.events, job_id) as arrived:
        if job_id is not None:
            job = await bridge.run(control.database.job, job_id)
            if job is None:
                return
            yield _encode(Event("job", job.id, job_to_dict(job)))
            if job.ended is not None:
                return
        while True:
            event = await arrived.get()
            yield _encode(event)
            if job_id is not None and event.kind == "job" and event.data["ended"] is not None:
                return


def _encode(event: Event) -> ServerSentEvent:
    data: Mapping[str, Any] = {"job": event.job, **event.data}
    return event_stream.event(event.kind, json.dumps(data, ensure_ascii=False, default=str))
