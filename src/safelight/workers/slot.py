"""A slot: a device with its worker, what it does now, and whether it goes on. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from safelight.errors import SafelightError
from safelight.logs import Log
from safelight.queue.events import Event, Events
from safelight.queue.job import QueuedJob
from safelight.queue.order import SlotView
from safelight.workers.job_runner import JobRunner, Outcome
from safelight.workers.slot_supervisor import SlotSupervisor

_log = Log(__name__)

FIRST_PAUSE, MOST_PAUSE = 0.1, 10.0
"""Seconds: the first and the longest pause between two tries when a slot cannot continue."""

LOOK_SECONDS = 1.0
"""Seconds between two looks at whether the slots make progress."""


class Trouble:
    """Why a slot cannot continue (``reason``, "" if it can), and how long it pauses before the next try."""

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
        """The slot continues."""
        if self.reason:
            _log.info("the queue continues", after=self.reason)
        self.reason, self._pause = "", FIRST_PAUSE


class Slot:
    """A device with its worker. A thread of the dispatcher runs its jobs, one after another.

    ``draining``: it takes no more jobs. Set by ``Dispatcher.drain``, never while a slot chooses.
    ``restarts_when_free``: its worker is replaced before its next job.
    ``unloaded``: its models were evicted since its last job.
    ``unwritten``: a job that ended, and whose end is not in the database yet.
    ``charged``: the seconds that its running job was predicted to take, which its person's share has.
    """

    def __init__(self, name: str, supervisor: SlotSupervisor, runner: JobRunner) -> None:
        self.name, self.supervisor, self.runner = name, supervisor, runner
        self.trouble = Trouble()
        self.draining = False
        self.unloaded = True
        self.restarts_when_free = False
        self.unwritten: tuple[QueuedJob, Outcome] | None = None
        self.switches = 0
        self.free_since = time.monotonic()
        self.charged = 0.0
        self.thread: threading.Thread | None = None

    @property
    def takes_jobs(self) -> bool:
        """Whether it asks for jobs when it is free."""
        return not self.draining and not self.problem

    @property
    def problem(self) -> str:
        """Why it takes no jobs, although it should; "" if it does."""
        return self.trouble.reason or self.supervisor.problem

    @property
    def free_seconds(self) -> float:
        """The seconds since its last job ended."""
        return time.monotonic() - self.free_since

    def view(self, seconds_of: Callable[[str], float]) -> SlotView:
        """Return the slot as the order sees it. ``seconds_of``: predicts the seconds of a job, by its group."""
        running = self.runner.running
        if running is None:
            return SlotView(self.name, self.runner.resident, 0.0, self.free_seconds)
        group = running.job.group
        resident = (group, *(other for other in self.runner.resident if other != group))
        return SlotView(self.name, resident, max(0.1, seconds_of(group) - (time.time() - running.since)))


def watch(slots: Callable[[], Sequence[Slot]], events: Events, stall_seconds: float, stopping: threading.Event) -> None:
    """Replace the worker of each slot whose job makes no progress for a time, until the server stops."""
    while not stopping.wait(LOOK_SECONDS):
        for slot in slots():
            running = slot.runner.running
            if running is None or time.monotonic() - slot.runner.heard < stall_seconds:
                continue
            stage = running.progress.stage if running.progress else "start"
            why = f"no progress in the stage {stage} for {stall_seconds:.0f} s"
            _log.warning("replacing the worker", slot=slot.name, job=running.job.id, why=why)
            events.tell(Event("worker", running.job.id, {"slot": slot.name, "stalled": why}, running.job.person))
            slot.runner.replace_worker(why)
