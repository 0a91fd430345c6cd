"""Chooses the next job of each slot, with predictions of how long jobs and switches take. No torch."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count

from safelight.errors import StorageError
from safelight.queue import order
from safelight.queue.database import Database
from safelight.queue.job import QueuedJob
from safelight.queue.order import Costs, OvertakeLimits, SlotView, Waiting
from safelight.queue.shares import Shares
from safelight.workers.slot import Slot

MAX_UPCOMING_MODELS = 3
"""The most models of upcoming jobs that are named to a worker, for its planner."""

UPCOMING_JOBS_SCANNED = 12
"""Jobs at the head of the queue in which the upcoming models are looked for."""

UNKNOWN_SECONDS = 10.0
"""What a job is assumed to take before any has ended."""

UNKNOWN_SWITCH_SECONDS = 1.0
"""What a switch is assumed to take before any was measured."""

NEWEST_SHARE = 0.3
"""The weight of the newest job in the mean of a model's jobs."""


class Choosing:
    """Gives free slots their jobs. Only one slot chooses at a time, so the bounds hold over all.

    ``limits``: how far the order may differ from the order of arrival, and from equal shares.
    ``switch_seconds``: predicts the seconds of a switch to each group; without those of which nothing is known.
    ``shares``: who has computed how long.

    The attribute ``slots`` has all slots of the server. While ``paused`` is set, no slot gets a job: see ``pause``.
    """

    def __init__(
        self,
        database: Database,
        limits: OvertakeLimits,
        switch_seconds: Callable[[], Mapping[str, float]] = dict,
        shares: Shares | None = None,
    ) -> None:
        self._database, self._limits = database, limits
        self._switch_seconds = switch_seconds
        self._shares = shares or Shares()
        self._job_seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._unsure: set[str] = set()
        self._versions = count(1)
        self._version = 0
        self._ahead: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._known_waiting: tuple[int, list[Waiting]] = 0, []
        self.slots: Sequence[Slot] = ()
        self.paused = False

    def next_job(self, slot: Slot) -> QueuedJob | None:
        """Choose a slot's next job and start it. None if there is none for it."""
        with self._lock:
            self._put_back_unsure()
            while not (self.paused or slot.draining or slot.supervisor.problem):
                # More than this choice needs: what the slot runs after it is found in the same jobs.
                waiting = self._waiting(UPCOMING_JOBS_SCANNED)
                if not waiting:
                    return None
                others = [self._view(other) for other in self.slots if other is not slot and other.takes_jobs]
                here, leads = self._view(slot), self._leads(waiting)
                choice = order.choose(waiting, here, self._limits, others, leads, self._costs())
                if choice is None:
                    return None
                try:
                    job = self._database.start(choice.id, choice.reason, slot.name)
                except StorageError:
                    self._unsure.add(choice.id)
                    raise
                if job is None:
                    # It was cancelled meanwhile.
                    continue
                started = next(one for one in waiting if one.id == choice.id)
                self._known_waiting = self.queue_changed(), order.after_start(waiting, started)
                if here.resident[:1] != (job.group,):
                    slot.switches += 1
                slot.charged = self._seconds_of(job.group)
                self._shares.charge(job.person, slot.charged)
                slot.runner.announce(job)
                return job
            return None

    def _put_back_unsure(self) -> None:
        """Put jobs back into the queue that the database has started without confirming it: no slot has them."""
        while self._unsure:
            job = next(iter(self._unsure))
            running = [one.job.id for slot in self.slots if (one := slot.runner.running) is not None]
            if job not in running:
                self._database.put_back(job, "the database did not confirm its start", False, 0.0)
            self._unsure.discard(job)

    def pause(self, paused: bool) -> None:
        """Start no more jobs, or start them again. No job that arrives after this call starts."""
        with self._lock:
            self.paused = paused

    def drain(self, slot: Slot, draining: bool) -> None:
        """Give a slot no more jobs, or give it jobs again. It gets no job that arrives after this call."""
        with self._lock:
            slot.draining = draining

    def note(self, slot: Slot, job: QueuedJob, seconds: float, done: bool) -> None:
        """Correct the person's share by what the job really took, and remember it for predictions.

        ``done``: whether the job ended well, so that other jobs of its model will take as long.
        """
        with self._lock:
            self._shares.charge(job.person, seconds - slot.charged)
            if done:
                before = self._job_seconds.get(job.group, seconds)
                self._job_seconds[job.group] = before + NEWEST_SHARE * (seconds - before)

    def in_order(self, limit: int) -> list[tuple[order.Choice, str]]:
        """Return the first ``limit`` waiting jobs in the order in which they will start, each with its slot."""
        return list(self._in_order(self._waiting(limit), limit))

    def queue_changed(self) -> int:
        """Note that jobs came or went, so that :meth:`upcoming` looks at the queue again.

        Returns the number of the queue's new version.
        """
        version = next(self._versions)
        self._version = version
        return version

    def upcoming(self, slot: str) -> tuple[str, ...]:
        """The models of the next jobs of a slot, the soonest first."""
        # A job asks twice: when it starts and at its first step.
        version = self._version
        if self._ahead.get(slot, (None,))[0] != version:
            self._ahead[slot] = version, self._find_upcoming(slot)
        return self._ahead[slot][1]

    def _find_upcoming(self, slot: str) -> tuple[str, ...]:
        version, waiting = self._known_waiting
        if version != self._version:
            waiting = self._waiting(UPCOMING_JOBS_SCANNED)
        groups = {job.id: job.group for job in waiting}
        first: dict[str, str] = {}
        most = min(MAX_UPCOMING_MODELS, len(set(groups.values())))
        for choice, name in self._in_order(waiting, UPCOMING_JOBS_SCANNED):
            if name in (slot, ""):
                first.setdefault(groups[choice.id], choice.id)
            if len(first) == most:
                break
        return tuple(dict.fromkeys(self._database.models_of(list(first.values())))) if first else ()

    def _waiting(self, limit: int) -> list[Waiting]:
        return self._database.waiting(order.candidates_needed(self._limits, limit))

    def _in_order(self, waiting: Sequence[Waiting], limit: int) -> Iterator[tuple[order.Choice, str]]:
        slots = [self._view(slot) for slot in self.slots if slot.takes_jobs] or [SlotView()]
        with self._lock:
            leads = self._leads(waiting)
        return order.in_order(waiting, slots, self._limits, limit, leads, self._costs())

    def _view(self, slot: Slot) -> SlotView:
        return slot.view(self._seconds_of)

    def _seconds_of(self, group: str) -> float:
        """Predict the seconds of a job."""
        found = self._job_seconds.get(group)
        if found is not None:
            return found
        known = list(self._job_seconds.values())
        return statistics.fmean(known) if known else UNKNOWN_SECONDS

    def _leads(self, waiting: Sequence[Waiting]) -> dict[str, float]:
        """Return how far each person is ahead whose jobs wait or run."""
        running = (one.job.person for slot in self.slots if (one := slot.runner.running) is not None)
        return self._shares.leads({*(job.person for job in waiting), *running})

    def _costs(self) -> Costs:
        """Return the predictions of one choice. The library is read only if a switch is in question, and once."""
        known = cache(self._switch_seconds)
        return Costs(lambda group: known().get(group, UNKNOWN_SWITCH_SECONDS), self._seconds_of)
