"""The dispatcher: takes the next job from the queue, has it run, and writes how it ended. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safelight.errors import QueueFullError, SafelightError, StorageError
from safelight.logs import Log
from safelight.queue import order
from safelight.queue.database import Database, recover
from safelight.queue.descriptions import tell_job
from safelight.queue.events import Events
from safelight.queue.image_store import ImageStore
from safelight.queue.job import QueuedJob
from safelight.queue.order import OvertakeLimits
from safelight.queue.timings import Timings
from safelight.request.job import Job
from safelight.request.schema import Request
from safelight.workers.isolation import IsolatedRunner
from safelight.workers.job_runner import JobRunner, Outcome, RunningJob
from safelight.workers.supervisor import Supervisor

_log = Log(__name__)

MAX_UPCOMING_MODELS = 3
"""The most models of upcoming jobs that the dispatcher names to the worker, for its planner."""

FIRST_PAUSE, MOST_PAUSE = 0.1, 10.0
"""Seconds: the first and the longest pause between two tries when the queue cannot continue."""

UPCOMING_JOBS_SCANNED = 12
"""Jobs at the head of the queue in which the dispatcher looks for the upcoming models."""


class Trouble:
    """Why the queue cannot continue (``reason``, "" if it can), and how long it pauses before the next try."""

    def __init__(self) -> None:
        self.reason, self._pause = "", FIRST_PAUSE

    def note(self, error: Exception) -> float:
        """Log the error once. Return the seconds to pause, more each time."""
        reason = str(error) if isinstance(error, SafelightError) else f"{type(error).__name__}: {error}"
        if reason != self.reason:
            expected = isinstance(error, SafelightError)
            _log.error("the queue waits", why=reason) if expected else _log.exception("the queue waits", why=reason)
        self.reason = reason
        pause, self._pause = self._pause, min(2 * self._pause, MOST_PAUSE)
        return pause

    def clear(self) -> None:
        """The queue continues."""
        if self.reason:
            _log.info("the queue continues", after=self.reason)
        self.reason, self._pause = "", FIRST_PAUSE


class Dispatcher:
    """Runs the queued jobs, one after another, in a thread of its own.

    Every accepted job ends exactly once: done, failed with a reason, or cancelled.

    overtake_limits: limit how far the order may differ from the order of arrival.
    max_queued: the number of jobs that may wait.
    timings: records how long images take.
    idle_seconds: after this time without a job, the worker frees the memory of its models; 0: never.
    resolve: called with a stored request and the digest of its model, for a job that an earlier version stored
        unresolved; returns the job.
    """

    def __init__(
        self,
        database: Database,
        images: ImageStore,
        supervisor: Supervisor,
        isolated_runner: IsolatedRunner,
        events: Events,
        overtake_limits: OvertakeLimits,
        max_queued: int,
        resolve: Callable[[Request, str], Job],
        timings: Timings,
        idle_seconds: float = 0.0,
    ) -> None:
        self._idle_seconds = idle_seconds
        self._database = database
        self._events = events
        self._overtake_limits = overtake_limits
        self._max_queued = max_queued
        self._stopping = threading.Event()
        self._images = images
        self._runner = JobRunner(
            database,
            self._images,
            supervisor,
            isolated_runner,
            events,
            resolve,
            self._upcoming,
            timings,
            self._stopping,
        )
        self._changed = threading.Condition()
        self._news = False
        self._unloaded = True
        self._unwritten: tuple[QueuedJob, Outcome] | None = None
        self._trouble = Trouble()
        self._switches = 0
        self._thread = threading.Thread(target=self._run, name="safelight-dispatch", daemon=True)

    @property
    def running(self) -> RunningJob | None:
        """The running job; None if no job is running."""
        return self._runner.running

    @property
    def trouble(self) -> str:
        """Why the queue waits, for example a full disk; "" if it does not wait. No job is lost meanwhile."""
        return self._trouble.reason

    @property
    def switches(self) -> int:
        """The number of jobs so far whose model differed from that of the job before."""
        return self._switches

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the models in the worker's memory after its last job, the most recently used first."""
        return self._runner.resident

    @property
    def memory(self) -> Mapping[str, Any]:
        """The worker's last report of its memory, see :meth:`safelight.workers.local_engine.LocalEngine.memory`."""
        return self._runner.memory

    def start(self) -> None:
        """Recover the jobs and files of an earlier server, and start the thread."""
        recover(self._database)
        self._images.sweep()
        self._thread.start()

    def accept(self, *jobs: Job, client: str = "", priority: int = 0) -> list[QueuedJob]:
        """Queue resolved requests.

        Raises QueueFullError if not all of them fit; then none is queued.
        """
        waiting = self._database.queued()
        if waiting + len(jobs) > self._max_queued:
            raise QueueFullError(waiting)
        queued = self._database.accept(*jobs, client=client, priority=priority)
        for job in queued:
            self._tell(job.id)
        self._wake()
        return queued

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; a running one stops at its next step. Returns whether it was queued or running."""
        if self._database.end(job_id, "cancelled", "cancelled while it waited", was=("queued",)):
            self._tell(job_id)
            return True
        job = self._database.job(job_id)
        if job is None or job.state != "running":
            return False
        self._runner.cancel(job_id)
        return True

    def set_priority(self, job_id: str, priority: int) -> bool:
        """Set the priority of a job that waits. Returns whether it waited."""
        changed = self._database.set_priority(job_id, priority)
        if changed:
            self._tell(job_id)
            self._wake()
        return changed

    def cancel_waiting(self) -> list[str]:
        """Cancel all jobs that wait, and return their identifiers."""
        waiting = [job.id for job in self._database.jobs(("queued",), limit=1_000_000)]
        return [job_id for job_id in waiting if self.cancel(job_id)]

    def queue(self, limit: int) -> list[tuple[QueuedJob, str]]:
        """The first ``limit`` waiting jobs, in the order in which they will start if no other job arrives.

        Returns each job with the reason for its position.
        """
        running = self._runner.running
        current = running.job.group if running is not None else None
        resident = tuple(dict.fromkeys(group for group in (current, *self._runner.resident) if group is not None))
        choices = order.in_order(
            self._database.waiting(order.candidates_needed(self._overtake_limits, limit)),
            resident,
            self._overtake_limits,
            limit,
        )
        jobs = self._database.jobs_of([choice.id for choice in choices])
        return [(jobs[choice.id], choice.reason) for choice in choices if choice.id in jobs]

    def stop(self, seconds: float) -> None:
        """Start no more jobs. The running job may finish within ``seconds``; otherwise it goes back into the queue."""
        self._stopping.set()
        self._wake()
        if not self._thread.is_alive():
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._runner.interrupt()
            # A step of a large model may take longer than this. Then close() kills the worker.
            self._thread.join(min(5.0, seconds))
        self._runner.close()
        self._thread.join(5.0)

    def note_loading(self) -> None:
        """Note that a client had a model loaded without a job: its memory is freed after the idle time, too."""
        with self._changed:
            self._unloaded = False
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _tell(self, job_id: str) -> None:
        tell_job(job_id, self._database, self._events)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._news = False
            try:
                ran = self._next()
            except Exception as error:  # noqa: BLE001 - an error in one job must not stop the other jobs
                pause = self._trouble.note(error)
                with self._changed:
                    self._changed.wait_for(self._stopping.is_set, pause)
                continue
            if ran:
                self._trouble.clear()
                self._unloaded = False
                continue
            with self._changed:
                seconds = None if self._unloaded or not self._idle_seconds else self._idle_seconds
                something = self._changed.wait_for(lambda: self._news or self._stopping.is_set(), seconds)
                self._unloaded = self._unloaded or not something
            if not something:
                self._runner.unload()

    def _next(self) -> bool:
        """Run the next job. Returns whether there was one."""
        self._write()
        resident = self._runner.resident
        choice = order.choose(
            self._database.waiting(order.candidates_needed(self._overtake_limits, 1)), resident, self._overtake_limits
        )
        if choice is None:
            return False
        job = self._database.start(choice.id, choice.reason)
        if job is None:
            return True
        if resident[:1] != (job.group,):
            self._switches += 1
        outcome = self._runner.run(job)
        self._unwritten = job, outcome
        self._write()
        if outcome.failure == "storage":
            # The job is queued again. Pause, because the next job would fail in the same way.
            raise StorageError(Path(job.id), outcome.reason)
        return True

    def _write(self) -> None:
        """Write the last outcome to the database. If that fails (its disk is full), try again before the next job."""
        if self._unwritten is None:
            return
        job, outcome = self._unwritten
        if outcome.state != "queued":
            failure = outcome.failure
            self._database.end(job.id, outcome.state, outcome.reason, seconds=outcome.seconds, failure=failure)
            self._runner.cancelled.discard(job.id)
        else:
            self._database.put_back(job.id, outcome.reason, outcome.counts_as_attempt, outcome.seconds)
            if job.id in self._runner.cancelled:
                # Somebody cancelled the job after its outcome was known, so end it here. From now on, cancel() finds
                # it in the queue.
                self._database.end(job.id, "cancelled", "cancelled while it ran", was=("queued",))
        self._tell(job.id)
        self._unwritten = None
        self._log(job, outcome.seconds)

    def _log(self, before: QueuedJob, seconds: float) -> None:
        job = self._database.job(before.id) or before
        values = {"job": job.id, "model": job.request.model, "images": job.images, "attempt": before.attempts}
        _log.info("job", state=job.state, seconds=round(seconds, 3), why=job.reason, **values)

    def _upcoming(self) -> tuple[str, ...]:
        """The models of the next jobs, the soonest first."""
        models = dict.fromkeys(job.request.model for job, _ in self.queue(UPCOMING_JOBS_SCANNED))
        return tuple(models)[:MAX_UPCOMING_MODELS]
