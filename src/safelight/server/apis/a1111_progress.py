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
    """The jobs of each request whose client waits. Choices in a prompt and several slots make several jobs of one."""

    def __init__(self) -> None:
        self._requests: list[Sequence[QueuedJob]] = []

    @contextmanager
    def running(self, jobs: Sequence[QueuedJob]) -> Generator[None]:
        """Until the context ends, these are the jobs of one request."""
        self._requests.append(jobs)
        try:
            yield
        finally:
            self._requests.remove(jobs)

    def siblings(self, job: QueuedJob) -> list[str]:
        """Return the identifiers of all jobs of the request that this job belongs to."""
        for jobs in list(self._requests):
            if any(one.id == job.id for one in jobs):
                return [one.id for one in jobs]
        return [job.id]

    def of(self, client: str, person: str) -> list[list[str]]:
        """Return the identifiers of the jobs of each request of a client, the first request first."""
        own = (jobs for jobs in list(self._requests) if (jobs[0].client, jobs[0].person) == (client, person))
        return [[job.id for job in jobs] for jobs in own]


class ProgressRoutes:
    """The routes for the running request."""

    def __init__(self, control: Services, requests: RunningRequests) -> None:
        self._dispatcher, self._database, self._requests = control.dispatcher, control.database, requests

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/progress")(self.progress)
        api.post("/interrupt")(self.interrupt)
        api.post("/skip")(self.skip)

    def progress(self, who: Who, skip_current_image: bool = False) -> dict[str, Any]:
        """Return the progress of a running request of the person, whichever client sent it.

        If several run, it is that of the first slot.
        """
        running = {one.job.id: one for one in self._dispatcher.running().values() if who.owns(one.job.person)}
        first = next(iter(running.values()), None)
        siblings = [] if first is None else self._requests.siblings(first.job)
        if len(siblings) < 2:
            return describe_progress(first, skip_current_image)
        jobs = self._database.jobs_of(siblings).values()
        done = sum(_images_done(job, running.get(job.id)) for job in jobs)
        return describe_progress(first, skip_current_image, (done, sum(job.request.count for job in jobs)))

    def interrupt(self, http: HTTPRequest) -> dict[str, Any]:
        """Cancel all jobs of the requests that have begun, if they came from this address."""
        for siblings in self._requests.of(*_sent_by(http)):
            jobs = self._database.jobs_of(siblings).values()
            for job in jobs if any(one.state != "queued" for one in jobs) else ():
                self._dispatcher.cancel(job.id)
        return {}

    def skip(self, http: HTTPRequest) -> dict[str, Any]:
        """Cancel the running job, if it came from this address."""
        job = self._own_job(http)
        if job is not None:
            self._dispatcher.cancel(job.id)
        return {}

    def _own_job(self, http: HTTPRequest) -> QueuedJob | None:
        """Return the running job that came from this address; None if there is none."""
        running = (one.job for one in self._dispatcher.running().values())
        return next((job for job in running if (job.client, job.person) == _sent_by(http)), None)


def _sent_by(http: HTTPRequest) -> tuple[str, str]:
    """Return the client and the person of a request, as its jobs name them."""
    return f"a1111 {client_of(http).address}", person_of(http).name


def _images_done(job: QueuedJob, running: RunningJob | None) -> float:
    """Return how many images of a job are made, with a share of the present one."""
    if job.ended is not None:
        return job.request.count
    if running is None or running.progress is None:
        return job.images
    now = running.progress
    share = now.step / max(1, now.steps) if now.stage == "denoise" else 1.0 if now.stage == "decode" else 0.0
    return now.image + share


def describe_progress(
    running: RunningJob | None, skip_image: bool, of_request: tuple[float, int] | None = None
) -> dict[str, Any]:
    """Describe the running job in A1111's form.

    ``skip_image``: leave out the preview.
    ``of_request``: how many images of its request are made, and how many were asked for, if it has other jobs, too.
    """
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
    done, images = of_request or (_images_done(job, running), job.request.count)
    share = done / images
    spent = time.time() - running.since
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(running.since))
    count = {"job": job.id, "job_count": images, "job_timestamp": stamp, "job_no": min(int(done), images - 1)}
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
