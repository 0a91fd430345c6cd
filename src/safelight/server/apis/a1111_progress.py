"""Routes for the running request: its progress, and cancelling it."""

from __future__ import annotations

import base64
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest

from safelight.assembly.services import Services
from safelight.queue.image_files import preview_png
from safelight.queue.job import QueuedJob
from safelight.request.steps import computed_steps
from safelight.server.access import Who, person_of
from safelight.server.clients import client_of
from safelight.workers.dispatcher import RunningJob


class RunningRequests:
    """The jobs of each request that has not ended. A request has several jobs if its prompt contains choices."""

    def __init__(self) -> None:
        self._siblings: dict[str, list[str]] = {}

    @contextmanager
    def running(self, jobs: Sequence[QueuedJob]) -> Generator[None]:
        """Until the context ends, these are the jobs of one request."""
        self._siblings.update({job.id: [sibling.id for sibling in jobs] for job in jobs})
        try:
            yield
        finally:
            for job in jobs:
                self._siblings.pop(job.id, None)

    def siblings(self, job: QueuedJob) -> list[str]:
        """Return the identifiers of all jobs of the request that this job belongs to."""
        return self._siblings.get(job.id, [job.id])


class ProgressRoutes:
    """The routes for the running request."""

    def __init__(self, control: Services, requests: RunningRequests) -> None:
        self._dispatcher, self._requests = control.dispatcher, requests

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/progress")(self.progress)
        api.post("/interrupt")(self.interrupt)
        api.post("/skip")(self.skip)

    def progress(self, who: Who, skip_current_image: bool = False) -> dict[str, Any]:
        """Return the progress of a running job of the person, whichever client sent it.

        If several run, it is that of the first slot.
        """
        running = (one for one in self._dispatcher.running().values() if who.owns(one.job.person))
        return describe_progress(next(running, None), skip_current_image)

    def interrupt(self, http: HTTPRequest) -> dict[str, Any]:
        """Cancel all jobs of the running request, if it came from this address."""
        job = self._own_job(http)
        for each in self._requests.siblings(job) if job is not None else ():
            self._dispatcher.cancel(each)
        return {}

    def skip(self, http: HTTPRequest) -> dict[str, Any]:
        """Cancel the running job, if it came from this address."""
        job = self._own_job(http)
        if job is not None:
            self._dispatcher.cancel(job.id)
        return {}

    def _own_job(self, http: HTTPRequest) -> QueuedJob | None:
        """Return the running job that came from this address; None if there is none."""
        sent_by = f"a1111 {client_of(http).address}", person_of(http).name
        running = (one.job for one in self._dispatcher.running().values())
        return next((job for job in running if (job.client, job.person) == sent_by), None)


def describe_progress(running: RunningJob | None, skip_image: bool) -> dict[str, Any]:
    """Describe the running job in A1111's form. ``skip_image``: leave out the preview."""
    empty = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0}
    steps = {"job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    if running is None or running.progress is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": {**empty, **steps},
            "current_image": None,
            "textinfo": None,
        }
    job, now = running.job, running.progress
    # The worker knows how many steps the model computes; without a model, the request only tells the usual number.
    steps = now.steps if now.stage == "denoise" else computed_steps(job.request)
    done = now.image * steps + (now.step if now.stage == "denoise" else 0)
    done += steps if now.stage == "decode" else 0
    share = done / (steps * job.request.count)
    spent = time.time() - running.since
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(running.since))
    count = {"job": job.id, "job_count": job.request.count, "job_timestamp": stamp, "job_no": now.image}
    at = {"sampling_step": now.step if now.stage == "denoise" else 0, "sampling_steps": steps}
    preview = now.preview if not skip_image else None
    picture = None
    if preview is not None:
        picture = base64.b64encode(preview_png(preview)).decode()
    return {
        "progress": min(share, 0.99),
        "eta_relative": spent / share - spent if share else 0.0,
        "state": {**empty, **count, **at},
        "current_image": picture,
        "textinfo": now.stage,
    }
