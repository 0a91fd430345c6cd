"""Runs a job: gives it to the worker, passes on its progress, stores its images, and says how it ended. No torch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from safelight.errors import Cancelled, SafelightError, WorkerDiedError
from safelight.logs import Log
from safelight.queue.database import Database
from safelight.queue.descriptions import progress_to_dict, tell_job
from safelight.queue.events import Event, Events
from safelight.queue.image_files import preview_url
from safelight.queue.image_store import ImageStore
from safelight.queue.job import ATTEMPTS, Failure, QueuedJob, failure_of
from safelight.queue.timings import Timings
from safelight.request.job import Job
from safelight.request.results import Image, Progress
from safelight.request.schema import Request
from safelight.workers.isolation import IsolatedRunner
from safelight.workers.messages import Ended, Generate, Made, Progressed
from safelight.workers.slot_supervisor import SlotSupervisor

_log = Log(__name__)

UNLOAD_SECONDS = 60.0
"""The worker answers within this time, or the next job finds it busy."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """The running job and its progress. ``since``: the time of its start, in seconds since 1970."""

    job: QueuedJob
    since: float
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one attempt at a job.

    state: ``queued`` if the job goes back into the queue.
    counts_as_attempt: whether the attempt counts.
    seconds: how long it ran.
    """

    state: Literal["queued", "done", "failed", "cancelled"]
    reason: str = ""
    failure: Failure = ""
    counts_as_attempt: bool = True
    seconds: float = 0.0


class JobRunner:
    """Runs one job at a time, on the worker or, if the job asks for it, in an isolated process.

    One thread calls :meth:`run`. Any thread may call the other methods and read the attributes.

    slot: the name of its slot.
    resolve: called with a stored request and the digest of its model, for a job that an earlier version stored
        unresolved; returns the job.
    upcoming: returns the models of the next jobs, the soonest first.
    timings: records how long each image took.
    stopping: set when the server stops.

    The attribute ``running`` is the running job; None if no job is running. ``cancelled`` has the identifiers of the
    running jobs that somebody cancelled. ``resident`` has the digests of the models in the worker's memory, that of the
    last job first. ``memory`` is the worker's last report of its memory. ``heard`` is when the worker last said
    anything about the running job, by the monotonic clock: the wall clock may jump.
    """

    def __init__(
        self,
        slot: str,
        database: Database,
        images: ImageStore,
        supervisor: SlotSupervisor,
        isolated_runner: IsolatedRunner,
        events: Events,
        resolve: Callable[[Request, str], Job],
        upcoming: Callable[[], tuple[str, ...]],
        timings: Timings,
        stopping: threading.Event,
    ) -> None:
        self._slot = slot
        self._database = database
        self._images = images
        self._supervisor = supervisor
        self._isolated_runner = isolated_runner
        self._events = events
        self._resolve = resolve
        self._upcoming = upcoming
        self._timings = timings
        self._stopping = stopping
        self._interrupted = False
        self.running: RunningJob | None = None
        self.cancelled: set[str] = set()
        self.resident: tuple[str, ...] = ()
        self.memory: Mapping[str, Any] = {}
        self.heard = 0.0
        self._stalled = ""

    def announce(self, job: QueuedJob) -> None:
        """Note that a job is about to run, so that nobody takes this slot for free."""
        self.heard = time.monotonic()
        self._stalled = ""
        self.running = RunningJob(job, time.time())

    def run(self, job: QueuedJob) -> Outcome:
        """Run a job, until it ends or goes back into the queue."""
        self.announce(job)
        begun = self.heard
        try:
            outcome = self._attempt(job)
        finally:
            self.running = None
        return replace(outcome, seconds=time.monotonic() - begun)

    def cancel(self, job_id: str) -> None:
        """Stop a running job at its next step. It ends as cancelled."""
        # Record the cancellation first, so that a worker that starts or restarts now does not get the job.
        self.cancelled.add(job_id)
        self._supervisor.cancel(job_id)
        self._isolated_runner.cancel(job_id)

    def interrupt(self) -> None:
        """Stop the running job at its next step, and start no other. It goes back into the queue."""
        self._interrupted = True
        if (running := self.running) is not None:
            self._supervisor.cancel(running.job.id)
            self._isolated_runner.cancel(running.job.id)

    def unload(self) -> None:
        """Let the worker free the memory of all models that are not pinned."""
        try:
            self.resident = tuple(self._supervisor.ask("unload").result(UNLOAD_SECONDS))
            _log.info("idle: the models' memory was freed", still_there=len(self.resident))
        except Exception as error:  # noqa: BLE001 - the next job must run, whatever went wrong here
            _log.warning("idle: the models' memory was not freed", why=str(error))

    def replace_worker(self, why: str) -> None:
        """Kill the process of the running job, because it makes no progress. The job is tried once more, elsewhere if
        possible."""
        self._stalled = why
        # The replacement gets as much time.
        self.heard = time.monotonic()
        running = self.running
        if running is not None and running.job.request.isolate:
            self._isolated_runner.kill()
        else:
            self._supervisor.kill()

    def close(self) -> None:
        """End the processes."""
        self._supervisor.close()
        self._isolated_runner.close()

    def _attempt(self, job: QueuedJob) -> Outcome:
        """Run a job, and turn each error into an outcome."""
        try:
            tell_job(job, self._events)
            if job.unreadable:
                return Outcome("failed", f"this version cannot read its request: {job.unreadable}", "input")
            if job.images >= job.request.count:
                # An earlier server stopped between the job's last image and its end.
                return Outcome("done")
            return self._make_images(job)
        except Cancelled:
            return self._stopped_outcome(job)
        except WorkerDiedError as error:
            self.resident = ()
            about = {"slot": self._slot, "died": str(error), "restarts": self._supervisor.restarts}
            self._events.tell(Event("worker", job.id, about, job.person))
            return self._retry_or_fail(job, self._stalled or str(error))
        except SafelightError as error:
            return _failed(failure_of(error), str(error))
        except Exception as error:  # noqa: BLE001 - an error in one job must not stop the other jobs
            _log.exception("an unexpected error in a job", job=job.id)
            return Outcome("failed", f"{type(error).__name__}: {error}", "failed")

    def _retry_or_fail(self, job: QueuedJob, why: str) -> Outcome:
        if self._stopping.is_set() or job.id in self.cancelled:
            return self._stopped_outcome(job)
        if job.attempts < ATTEMPTS:
            return Outcome("queued", f"{why}; Safelight tries the job again")
        return Outcome("failed", f"{why}, {job.attempts} times", "worker")

    def _stopped_outcome(self, job: QueuedJob) -> Outcome:
        """The outcome of a job that a user cancelled, or that the stopping server interrupted."""
        if job.id in self.cancelled:
            return Outcome("cancelled", "cancelled while it ran")
        return Outcome("queued", "the server was stopped while it ran", counts_as_attempt=False)

    def _make_images(self, job: QueuedJob) -> Outcome:
        runner = self._isolated_runner if job.request.isolate else self._supervisor
        start = self._message_for(job)
        messages = runner.run(start, lambda: job.id in self.cancelled or self._interrupted)
        with contextlib.closing(messages):
            for message in messages:
                self.heard = time.monotonic()
                match message:
                    case Progressed(_, progress):
                        self._report_progress(job, progress)
                    case Made(_, index, image):
                        self._images.add(job, index, image, self._slot, self._supervisor.machine)
                        self._record_time(job, start.job.request, image)
                    case Ended(_, kind, problem, resident, memory):
                        # An isolated job used none of the worker's memory.
                        if not job.request.isolate:
                            self.resident = (job.group, *(digest for digest in resident if digest != job.group))
                            if memory is not None:
                                self.memory = memory
                                self._events.tell(Event("memory", "", memory))
                        if kind == "cancelled":
                            return self._stopped_outcome(job)
                        return Outcome("done") if kind == "done" else _failed(kind, problem)
                    case _:
                        raise AssertionError(message)
        raise AssertionError("the worker's messages end with Ended")

    def _message_for(self, job: QueuedJob) -> Generate:
        """The message that starts the job. It begins after the images that are already stored."""
        resolved = job.job or self._resolve(job.request, job.model_digest)
        return Generate(job.id, resolved, job.images, self._upcoming())

    def _report_progress(self, job: QueuedJob, progress: Progress) -> None:
        running = self.running
        assert running is not None
        self.running = RunningJob(job, running.since, progress)
        if progress.memory is not None:
            self.memory = progress.memory
            self._events.tell(Event("memory", job.id, progress.memory, job.person))
        # A preview becomes a PNG file only for somebody.
        if self._events.anybody_hears("progress"):
            preview = {} if progress.preview is None else {"preview": preview_url(progress.preview)}
            about = {**progress_to_dict(progress), **preview, "slot": self._slot}
            self._events.tell(Event("progress", job.id, about, job.person))
        if progress.stage == "denoise" and progress.step == 1:
            upcoming = [name for name in self._upcoming() if name != job.request.model]
            if upcoming:
                # The next checkpoint loads while this one computes, if there is room.
                self._supervisor.ask("prefetch", upcoming[0])

    def _record_time(self, job: QueuedJob, request: Request, image: Image) -> None:
        drawn = image.metadata["request"]
        self._timings.add(job.group, request, drawn["width"] * drawn["height"], image.seconds)


def _failed(kind: Failure, problem: str) -> Outcome:
    """The outcome of a job that failed. On a full disk it goes back into the queue, and waits for room."""
    if kind == "storage":
        return Outcome("queued", problem, kind, counts_as_attempt=False)
    return Outcome("failed", problem, kind)
