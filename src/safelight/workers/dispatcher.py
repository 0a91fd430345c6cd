"""The dispatcher: has the queue's jobs run on its slots, and writes how they ended. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safelight.errors import StorageError
from safelight.logs import Log
from safelight.queue.database import Database, recover
from safelight.queue.descriptions import tell_job
from safelight.queue.events import Events
from safelight.queue.image_store import ImageStore
from safelight.queue.job import QueuedJob
from safelight.request.job import Job
from safelight.workers.choosing import Choosing
from safelight.workers.job_runner import RunningJob
from safelight.workers.slot import Slot, watch

_log = Log(__name__)

PATIENCE_SECONDS = 1.0
"""With several slots, a free one asks again after this time: the one to which a job was left may take longer than was
predicted."""


class Dispatcher:
    """Runs the queued jobs on the slots.

    Every accepted job ends exactly once: done, failed with a reason, or cancelled.

    slots: at least one.
    max_queued: the number of jobs that may wait.
    idle_seconds: after this time without a job, a slot's worker frees the memory of its models; 0: never.
    stall_seconds: a job without progress for so long is taken from its worker, which is replaced; 0: never.
    stopping: set when the server stops; the runners of the slots have it, too.
    """

    def __init__(
        self,
        database: Database,
        images: ImageStore,
        slots: Sequence[Slot],
        choosing: Choosing,
        events: Events,
        max_queued: int,
        idle_seconds: float = 0.0,
        stall_seconds: float = 0.0,
        stopping: threading.Event | None = None,
    ) -> None:
        self._idle_seconds = idle_seconds
        self._stall_seconds = stall_seconds
        self._database = database
        self._events = events
        self._max_queued = max_queued
        self._stopping = stopping or threading.Event()
        self._images = images
        self.slots = choosing.slots = tuple(slots)
        self._choosing = choosing
        self._changed = threading.Condition()
        self._started = False
        self._news = dict.fromkeys((slot.name for slot in slots), False)

    def running(self) -> dict[str, RunningJob]:
        """Return the running jobs by the names of their slots."""
        return {slot.name: found for slot in self.slots if (found := slot.runner.running) is not None}

    @property
    def trouble(self) -> str:
        """Why the queue waits, for example a full disk; "" if any slot goes on. No job is lost meanwhile."""
        reasons = [slot.trouble.reason for slot in self.slots]
        return reasons[0] if all(reasons) else ""

    @property
    def paused(self) -> bool:
        """Whether no more jobs start. Running ones go on."""
        return self._choosing.paused

    def pause(self, paused: bool) -> None:
        """Start no more jobs, or start them again."""
        self._choosing.pause(paused)
        self.wake()

    def drain(self, slot: Slot, draining: bool) -> None:
        """Let a slot finish its job and take no more, or let it take jobs again."""
        self._choosing.drain(slot, draining)
        self.wake()

    def slot(self, name: str) -> Slot | None:
        """Return the slot of a name; None if there is none."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def start(self) -> None:
        """Recover the jobs and files of an earlier server, and start the threads."""
        recover(self._database)
        self._images.sweep()
        self._started = True
        for slot in self.slots:
            _begin(slot, self._run)
        if self._stall_seconds:
            arguments = lambda: self.slots, self._events, self._stall_seconds, self._stopping
            threading.Thread(target=watch, args=arguments, name="safelight-watch", daemon=True).start()

    def add(self, slot: Slot) -> None:
        """Use one more slot, which a machine of the cluster offers."""
        self._news[slot.name] = True
        self.slots = self._choosing.slots = (*self.slots, slot)
        if self._started:
            _begin(slot, self._run)

    def accept(
        self, *jobs: Job, client: str = "", person: str = "", priority: int = 0, max_own: int | None = None
    ) -> list[QueuedJob]:
        """Queue resolved requests. ``max_own``: how many jobs of the person may wait.

        Raises QueueFullError if not all of them fit; then none is queued.
        """
        queued = self._database.accept(
            *jobs, client=client, person=person, priority=priority, max_queued=self._max_queued, max_own=max_own
        )
        for job in queued:
            tell_job(job, self._events)
        self.wake()
        return queued

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; a running one stops at its next step. Returns whether it was queued or running."""
        cancelled = self._database.end(job_id, "cancelled", "cancelled while it waited", was=("queued",))
        if cancelled is not None:
            self._choosing.queue_changed()
            tell_job(cancelled, self._events)
            return True
        job = self._database.job(job_id)
        if job is None or job.state != "running":
            return False
        for slot in self.slots:
            # A slot that does not run the job ignores this; the job may be between two slots.
            slot.runner.cancel(job_id)
        return True

    def set_priorities(self, priorities: Mapping[str, int]) -> list[str]:
        """Set the priorities of waiting jobs, by identifier. Returns the identifiers of the jobs that did wait."""
        changed = self._database.set_priorities(priorities)
        for job in changed:
            tell_job(job, self._events)
        if changed:
            self.wake()
        return [job.id for job in changed]

    def cancel_waiting(self, person: str | None = None) -> list[str]:
        """Cancel all jobs that wait, and return their identifiers; ``person``: only this person's."""
        every = self._database.jobs(("queued",), limit=1_000_000)
        waiting = [job.id for job in every if person is None or job.person == person]
        return [job_id for job_id in waiting if self.cancel(job_id)]

    def queue(self, limit: int) -> list[tuple[QueuedJob, str]]:
        """The first ``limit`` waiting jobs, in the order in which they will start if no other job arrives.

        Returns each job with the reason for its position.
        """
        choices = [choice for choice, _ in self._choosing.in_order(limit)]
        jobs = self._database.jobs_of([choice.id for choice in choices])
        return [(jobs[choice.id], choice.reason) for choice in choices if choice.id in jobs]

    def stop(self, seconds: float) -> None:
        """Start no more jobs. Running jobs may finish within ``seconds``; otherwise they go back into the queue."""
        self._stopping.set()
        self.wake()
        until = time.monotonic() + seconds
        threads = [slot.thread for slot in self.slots if slot.thread is not None]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            for slot in self.slots:
                slot.runner.interrupt()
            # A step of a large model may take longer than this. Then close() kills the worker.
            until = time.monotonic() + min(5.0, seconds)
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
        if threads:
            for slot in self.slots:
                slot.runner.close()
        for thread in threads:
            thread.join(5.0)

    def note_loading(self) -> None:
        """Note that a client had a model loaded without a job: its memory is freed after the idle time, too."""
        with self._changed:
            for slot in self.slots:
                slot.unloaded, slot.free_since = False, time.monotonic()
        self.wake()

    def wake(self) -> None:
        """Let all free slots ask for a job."""
        self._choosing.queue_changed()
        with self._changed:
            self._news = dict.fromkeys(self._news, True)
            self._changed.notify_all()

    def _run(self, slot: Slot) -> None:
        while not self._stopping.is_set():
            self._news[slot.name] = False
            try:
                ran = self._next(slot)
            except Exception as error:  # noqa: BLE001 - an error in one job must not stop the other jobs
                pause = slot.trouble.note(error)
                with self._changed:
                    self._changed.wait_for(self._stopping.is_set, pause)
                continue
            if ran:
                slot.trouble.clear()
                slot.unloaded = False
                continue
            seconds = None if slot.unloaded or not self._idle_seconds else self._idle_seconds
            patience = seconds if len(self.slots) == 1 else min(seconds or PATIENCE_SECONDS, PATIENCE_SECONDS)
            with self._changed:
                something = self._changed.wait_for(lambda: self._news[slot.name] or self._stopping.is_set(), patience)
            if not something and seconds is not None and slot.free_seconds >= seconds:
                slot.unloaded = True
                slot.runner.unload()

    def _next(self, slot: Slot) -> bool:
        """Run a slot's next job. Returns whether there was one."""
        self._write(slot)
        if slot.restarts_when_free:
            slot.restarts_when_free = False
            slot.supervisor.kill()
        job = None if self._stopping.is_set() else self._choosing.next_job(slot)
        if job is None:
            return False
        outcome = slot.runner.run(job)
        slot.unwritten = job, outcome
        self._choosing.note(slot, job, outcome.seconds, outcome.state == "done")
        self._write(slot)
        slot.free_since = time.monotonic()
        # Others may wait for its model, which is in memory now.
        self.wake()
        if outcome.failure == "storage":
            # The job is queued again. Pause, because the next job would fail in the same way.
            raise StorageError(Path(job.id), outcome.reason)
        return True

    def _write(self, slot: Slot) -> None:
        """Write a slot's last outcome to the database. If that fails (its disk is full), try again before its next
        job."""
        if slot.unwritten is None:
            return
        job, outcome = slot.unwritten
        reason, seconds = outcome.reason, outcome.seconds
        if outcome.state != "queued":
            now = self._database.end(
                job.id, outcome.state, reason, seconds=seconds, failure=outcome.failure, slot=slot.name
            )
        else:
            # If an earlier try was not confirmed, another slot may have the job already.
            now = self._database.put_back(job.id, reason, outcome.counts_as_attempt, seconds, slot.name)
            if job.id in slot.runner.cancelled:
                # Somebody cancelled the job after its outcome was known, so end it here. From now on, cancel() finds
                # it in the queue.
                now = self._database.end(job.id, "cancelled", "cancelled while it ran", was=("queued",)) or now
        # None if an earlier try has written the outcome, but the database did not confirm it.
        now = now or self._database.job(job.id) or job
        if now.state != "queued":
            for each in self.slots:
                each.runner.cancelled.discard(job.id)
        tell_job(now, self._events)
        slot.unwritten = None
        _log_end(now, job.attempts, seconds, slot.name if len(self.slots) > 1 else "")


def _log_end(job: QueuedJob, attempt: int, seconds: float, slot: str) -> None:
    """Log how an attempt at a job ended. ``slot``: "" if there is only one."""
    values = {"job": job.id, "model": job.request.model, "images": job.images, "attempt": attempt}
    more = {name: value for name, value in (("slot", slot), ("person", job.person)) if value}
    _log.info("job", state=job.state, seconds=round(seconds, 3), why=job.reason, **values, **more)


def _begin(slot: Slot, run: Callable[[Slot], None]) -> None:
    """Start the thread that runs a slot's jobs."""
    slot.thread = threading.Thread(target=run, args=(slot,), name=f"safelight-{slot.name}", daemon=True)
    slot.thread.start()
