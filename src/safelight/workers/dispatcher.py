"""The dispatcher: takes the next job from the queue, gives it to the worker, and stores the images. No torch."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import structlog

from safelight.errors import Cancelled, InputError, QueueFullError, SafelightError, StorageError, WorkerDiedError
from safelight.queue import order
from safelight.queue.database import Database, StoredImage
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery, preview_url
from safelight.queue.job import ATTEMPTS, Failure, QueuedJob
from safelight.queue.order import Rules
from safelight.request.job import Job
from safelight.request.results import Image, Progress
from safelight.request.schema import Request
from safelight.workers.isolation import Isolating
from safelight.workers.messages import Ended, Generate, Made, Progressed
from safelight.workers.supervisor import Supervisor

_log = structlog.get_logger(__name__)

FORESEEN = 3
"""Models of upcoming jobs that the worker's planner learns about."""

FIRST_PAUSE, MOST_PAUSE = 0.1, 10.0
"""Seconds: the first and the longest pause between two tries when the queue cannot continue."""

LOOKED_AT = 12
"""Jobs at the head of the queue in which the dispatcher looks for the upcoming models."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """The running job and its progress. ``since``: the time of its start, in seconds since 1970."""

    job: QueuedJob
    since: float
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The outcome of one attempt at a job.

    state: ``queued`` if the job goes back into the queue.
    free: whether the attempt does not count.
    seconds: how long it ran.
    """

    state: Literal["queued", "done", "failed", "cancelled"]
    reason: str = ""
    failure: Failure = ""
    free: bool = False
    seconds: float = 0.0


class Dispatcher:
    """Runs the queued jobs, one after another, in a thread of its own.

    Every accepted job ends exactly once: done, failed with a reason, or cancelled.

    rules: limit how far the order may differ from the order of arrival.
    most: the number of jobs that may wait.
    resolve: resolves the request of a job that an earlier version stored, by the model with a digest.
    """

    def __init__(
        self,
        database: Database,
        gallery: Gallery,
        supervisor: Supervisor,
        isolator: Isolating,
        events: Events,
        rules: Rules,
        most: int,
        resolve: Callable[[Request, str], Job],
    ) -> None:
        self._database = database
        self._gallery = gallery
        self._supervisor = supervisor
        self._isolator = isolator
        self._events = events
        self._rules = rules
        self._most = most
        self._resolve = resolve
        self._changed = threading.Condition()
        self._news = False
        self._at_hand: tuple[str, ...] = ()
        self._state: RunningJob | None = None
        self._cancelled: set[str] = set()
        self._unwritten: tuple[QueuedJob, _Outcome] | None = None
        self._trouble, self._pause = "", FIRST_PAUSE
        self._stopping = False
        self._put_back = False
        self._switches = 0
        self._memory: Mapping[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="safelight-dispatch", daemon=True)

    @property
    def state(self) -> RunningJob | None:
        """The running job, None if none is running."""
        return self._state

    @property
    def trouble(self) -> str:
        """Why the queue waits, for example a full disk; "" if it does not wait. No job is lost meanwhile."""
        return self._trouble

    @property
    def switches(self) -> int:
        """The number of jobs so far whose model differed from that of the job before."""
        return self._switches

    @property
    def memory(self) -> Mapping[str, Any]:
        """The worker's last report of its memory, see :meth:`safelight.workers.local_engine.LocalEngine.memory`."""
        return self._memory

    def start(self) -> None:
        """Recover the jobs and files of an earlier server, and start the thread."""
        self._database.recover()
        self._gallery.sweep(self._database.files())
        self._thread.start()

    def accept(self, *wanted: Job, client: str = "", priority: int = 0) -> list[QueuedJob]:
        """Queue resolved requests.

        Raises QueueFullError if not all of them fit; then none is queued.
        """
        waiting = self._database.queued()
        if waiting + len(wanted) > self._most:
            raise QueueFullError(waiting)
        jobs = self._database.accept(*wanted, client=client, priority=priority)
        for job in jobs:
            self._tell(job.id)
        self._wake()
        return jobs

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; a running one stops at its next step. Returns whether it was queued or running."""
        if self._database.end(job_id, "cancelled", "cancelled while it waited", was=("queued",)):
            self._tell(job_id)
            return True
        job = self._database.job(job_id)
        if job is None or job.state != "running":
            return False
        # Before the message to the worker: if the worker is still starting or dies now, no other worker gets the job.
        self._cancelled.add(job_id)
        self._supervisor.cancel(job_id)
        self._isolator.cancel(job_id)
        return True

    def forget(self, image_id: str) -> bool:
        """Remove an image and its files. Returns whether it existed."""
        image = self._database.forget_image(image_id)
        if image is None:
            return False
        self._gallery.remove(image.file)
        self._events.tell(Event("removed", image.job, {"id": image.id}))
        return True

    def queue(self, limit: int) -> list[tuple[QueuedJob, str]]:
        """The first ``limit`` waiting jobs, in the order in which they will start if no other job arrives.

        Returns each job with the reason for its position.
        """
        current = self._state.job.group if self._state is not None else None
        at_hand = tuple(dict.fromkeys(group for group in (current, *self._at_hand) if group is not None))
        choices = order.in_order(self._database.waiting(order.reached(self._rules, limit)), at_hand, self._rules, limit)
        jobs = self._database.jobs_of([choice.id for choice in choices])
        return [(jobs[choice.id], choice.reason) for choice in choices if choice.id in jobs]

    def stop(self, seconds: float) -> None:
        """Start no more jobs. The running job may finish within ``seconds``; otherwise it goes back into the queue."""
        self._stopping = True
        self._wake()
        if not self._thread.is_alive():
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._put_back = True
            if (state := self._state) is not None:
                self._supervisor.cancel(state.job.id)
                self._isolator.cancel(state.job.id)
            # A step of a large model may take longer than this. Then close() kills the worker.
            self._thread.join(min(5.0, seconds))
        self._supervisor.close()
        self._isolator.close()
        self._thread.join(5.0)

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _tell(self, job_id: str) -> None:
        job = self._database.job(job_id)
        if job is not None:
            self._events.tell(Event("job", job_id, described(job)))

    def _run(self) -> None:
        while not self._stopping:
            self._news = False
            try:
                ran = self._next()
            except Exception as error:  # noqa: BLE001 - an error in one job must not stop the other jobs
                self._pause_after(error)
                continue
            if ran:
                self._clear_trouble()
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self._news)

    def _pause_after(self, error: Exception) -> None:
        """Log the error once, and wait before the next try, longer each time."""
        trouble = str(error) if isinstance(error, SafelightError) else f"{type(error).__name__}: {error}"
        if trouble != self._trouble:
            expected = isinstance(error, SafelightError)
            _log.error("the queue waits", why=trouble) if expected else _log.exception("the queue waits", why=trouble)
        self._trouble = trouble
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, self._pause)
        self._pause = min(2 * self._pause, MOST_PAUSE)

    def _clear_trouble(self) -> None:
        if self._trouble:
            _log.info("the queue continues", after=self._trouble)
        self._trouble, self._pause = "", FIRST_PAUSE

    def _next(self) -> bool:
        """Run the next job. Returns whether there was one."""
        self._write()
        choice = order.choose(self._database.waiting(order.reached(self._rules, 1)), self._at_hand, self._rules)
        if choice is None:
            return False
        job = self._database.start(choice.id, choice.reason)
        if job is None:
            return True
        if self._at_hand[:1] != (job.group,):
            self._switches += 1
        begun = time.time()
        self._state = RunningJob(job, begun)
        try:
            outcome = self._outcome(job)
        finally:
            self._state = None
        self._unwritten = job, replace(outcome, seconds=time.time() - begun)
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
            self._cancelled.discard(job.id)
        else:
            self._database.put_back(job.id, outcome.reason, outcome.free, outcome.seconds)
            if job.id in self._cancelled:
                # Since the outcome was known, somebody cancelled the job. A later cancel finds it queued.
                self._database.end(job.id, "cancelled", "cancelled while it ran", was=("queued",))
        self._tell(job.id)
        self._unwritten = None
        self._log(job, outcome.seconds)

    def _outcome(self, job: QueuedJob) -> _Outcome:
        """Run a job, and turn each error into an outcome."""
        try:
            self._tell(job.id)
            if job.unreadable:
                return _Outcome("failed", f"this version cannot read its request: {job.unreadable}", "input")
            if job.images >= job.request.count:
                # An earlier server stopped between the job's last image and its end.
                return _Outcome("done")
            return self._make_images(job)
        except Cancelled:
            return self._stopped_outcome(job)
        except WorkerDiedError as error:
            self._at_hand = ()
            self._events.tell(Event("worker", job.id, {"died": str(error), "restarts": self._supervisor.restarts}))
            return self._retry_or_fail(job, str(error))
        except StorageError as error:
            return _Outcome("queued", str(error), "storage", free=True)
        except InputError as error:
            return _Outcome("failed", str(error), "input")
        except SafelightError as error:
            return _Outcome("failed", str(error), "failed")
        except Exception as error:  # noqa: BLE001 - an error in one job must not stop the other jobs
            _log.exception("an unexpected error in a job", job=job.id)
            return _Outcome("failed", f"{type(error).__name__}: {error}", "failed")

    def _log(self, before: QueuedJob, seconds: float) -> None:
        job = self._database.job(before.id) or before
        values = {"job": job.id, "model": job.request.model, "images": job.images, "attempt": before.attempts}
        _log.info("job", state=job.state, seconds=round(seconds, 3), why=job.reason, **values)

    def _retry_or_fail(self, job: QueuedJob, why: str) -> _Outcome:
        if self._stopping or job.id in self._cancelled:
            return self._stopped_outcome(job)
        if job.attempts < ATTEMPTS:
            return _Outcome("queued", f"{why}; Safelight tries the job again")
        return _Outcome("failed", f"{why}, {job.attempts} times", "worker")

    def _stopped_outcome(self, job: QueuedJob) -> _Outcome:
        """The outcome of a job that a user cancelled, or that the stopping server interrupted."""
        if job.id in self._cancelled:
            return _Outcome("cancelled", "cancelled while it ran")
        return _Outcome("queued", "the server was stopped while it ran", free=True)

    def _make_images(self, job: QueuedJob) -> _Outcome:
        runner = self._isolator if job.request.isolate else self._supervisor
        messages = runner.run(self._message_for(job), lambda: job.id in self._cancelled or self._put_back)
        with contextlib.closing(messages):
            for message in messages:
                match message:
                    case Progressed(_, progress):
                        self._report_progress(job, progress)
                    case Made(_, place, image):
                        self._store_image(job, place, image)
                    case Ended(_, kind, problem, resident):
                        if not job.request.isolate:
                            self._at_hand = (job.group, *(digest for digest in resident if digest != job.group))
                        self._supervisor.ask("memory").add_done_callback(self._store_memory)
                        if kind == "cancelled":
                            return self._stopped_outcome(job)
                        return _Outcome("done") if kind == "done" else _Outcome("failed", problem, kind)
                    case _:
                        raise AssertionError(message)
        raise AssertionError("the worker's messages end with Ended")

    def _store_memory(self, memory: Future[Any]) -> None:
        """Store the worker's memory report between two jobs. A worker that died meanwhile sends none."""
        if memory.exception() is None:
            self._memory = memory.result()
            self._events.tell(Event("memory", "", self._memory))

    def _message_for(self, job: QueuedJob) -> Generate:
        """The message that starts the job. It begins after the images that are already stored."""
        content = job.content or self._resolve(job.request, job.model_digest)
        return Generate(job.id, content, job.images, self._upcoming())

    def _upcoming(self) -> tuple[str, ...]:
        """The models of the next jobs, the soonest first."""
        return tuple(dict.fromkeys(job.request.model for job, _ in self.queue(LOOKED_AT)))[:FORESEEN]

    def _report_progress(self, job: QueuedJob, progress: Progress) -> None:
        state = self._state
        assert state is not None
        self._state = RunningJob(job, state.since, progress)
        if progress.memory is not None:
            self._memory = progress.memory
            self._events.tell(Event("memory", job.id, progress.memory))
        preview = {} if progress.preview is None else {"preview": preview_url(progress.preview)}
        self._events.tell(Event("progress", job.id, {**advanced(progress), **preview}))
        if progress.stage == "denoise" and progress.step == 1:
            upcoming = [name for name in self._upcoming() if name != job.request.model]
            if upcoming:
                # The next checkpoint loads while this one computes, if there is room.
                self._supervisor.ask("prefetch", upcoming[0])

    def _store_image(self, job: QueuedJob, place: int, image: Image) -> None:
        """Write the file first, then the row. So every row has its file, and the next start removes files without a
        row."""
        image_id = uuid.uuid4().hex
        stored = StoredImage(
            id=image_id,
            job=job.id,
            place=place,
            file=self._gallery.put(image, image_id),
            width=image.width,
            height=image.height,
            seed=image.seed,
            model=image.model,
            model_digest=image.model_digest,
            pixels_sha256=image.pixels_sha256,
            created=time.time(),
            metadata={
                **image.metadata,
                "made": {
                    "seconds": asdict(image.seconds),
                    "host_peak_bytes": image.host_peak_bytes,
                    "warnings": list(image.warnings),
                },
            },
        )
        try:
            added = self._database.add_image(stored)
        except BaseException:
            self._gallery.remove(stored.file)
            raise
        if not added:
            self._gallery.remove(stored.file)
            return
        self._events.tell(Event("image", job.id, pictured(stored)))


def advanced(progress: Progress) -> dict[str, Any]:
    """The progress of a job as plain values."""
    return {"stage": progress.stage, "image": progress.image, "step": progress.step, "steps": progress.steps}


def described(job: QueuedJob) -> dict[str, Any]:
    """A job as plain values."""
    request = job.request
    return {
        "id": job.id,
        "number": job.number,
        "state": job.state,
        "model": request.model,
        "model_digest": job.model_digest,
        "request": {name: getattr(request, name) for name in request.__slots__},
        "client": job.client,
        "priority": job.priority,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "attempts": job.attempts,
        "images": job.images,
        "overtaken": job.overtaken,
        "reason": job.reason,
        "failure": job.failure,
    }


def pictured(image: StoredImage) -> dict[str, Any]:
    """An image as plain values."""
    return {
        "id": image.id,
        "job": image.job,
        "place": image.place,
        "width": image.width,
        "height": image.height,
        "seed": image.seed,
        "model": image.model,
        "model_digest": image.model_digest,
        "pixels_sha256": image.pixels_sha256,
        "created": image.created,
        "metadata": dict(image.metadata),
        "url": f"/api/v1/images/{image.id}/file",
        "thumbnail": f"/api/v1/images/{image.id}/thumbnail",
    }
