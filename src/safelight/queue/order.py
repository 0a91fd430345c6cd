"""Choose the next job: jobs that need the same weights run together, within a bound. No torch, no I/O.

1. The bound: a job is next when ``overtakes`` later jobs started before it, or when later jobs computed for ``seconds``
   seconds while it waited. So at most ``overtakes`` later jobs overtake a job. Compared with first come, first
   served, a job waits at most ``seconds`` longer, plus the rest of the job that was running when the limit was reached.
2. Among the rest, the jobs with the highest priority. If one starts before older jobs, that counts as overtaking them.
3. A job that needs no switch. Only the oldest jobs (the window, ``WINDOW_FACTOR`` x ``overtakes``) are candidates. If
   more were, old jobs would reach the bound sooner. They would then run in order of arrival, often with a switch for
   each.
4. The oldest job.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

OVERTAKES = 64
SECONDS = 600.0

WINDOW_FACTOR = 1.25
"""The window of candidates as a multiple of the allowed overtakes (`benchmarks/ordering.py` compared other values)."""


@dataclass(frozen=True, slots=True)
class OvertakeLimits:
    """The bound.

    ``overtakes``: how many later jobs may overtake a job; 0 is first come, first served.
    ``seconds``: for how long later jobs may compute while a job waits.
    """

    overtakes: int = OVERTAKES
    seconds: float = SECONDS


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting job; its fields are those of :class:`safelight.queue.job.QueuedJob`."""

    id: str
    number: int
    group: str
    priority: int = 0
    overtaken: int = 0
    delayed: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The next job, and the rule that chose it."""

    id: str
    reason: str


def choose(waiting: Sequence[Waiting], resident: Sequence[str], limits: OvertakeLimits) -> Choice | None:
    """Return the next job of ``waiting``, or None when no job waits.

    ``resident``: the groups whose weights are in memory, the most recently used first.
    The same arguments always give the same choice.
    """
    if not waiting:
        return None
    oldest = min(waiting, key=lambda job: job.number)
    # A job that overtakes one job also overtakes all older ones, so the oldest job has the highest counts.
    if oldest.overtaken >= limits.overtakes:
        return Choice(oldest.id, f"{oldest.overtaken} later jobs overtook it, and no more may")
    if oldest.delayed >= limits.seconds:
        return Choice(oldest.id, f"later jobs delayed it by {oldest.delayed:.0f} s, and no more may")
    most = max(job.priority for job in waiting)
    first = (job for job in waiting if job.priority == most)
    ranked = heapq.nsmallest(_window(limits), first, key=lambda job: job.number)
    rank = {group: number for number, group in reversed(list(enumerate(resident)))}
    first = min(ranked, key=lambda job: (rank.get(job.group, len(rank)), job.number))
    if first.group in rank:
        return Choice(first.id, "its model is in memory")
    return Choice(first.id, "it has waited longest")


def in_order(waiting: Sequence[Waiting], resident: Sequence[str], limits: OvertakeLimits, limit: int) -> list[Choice]:
    """Return the first ``limit`` jobs of ``waiting`` in the order in which they start if no other job arrives.

    The prediction ignores the limit by time (``seconds``), because run times are unknown.
    The cost grows with ``limit``, not with the number of waiting jobs.
    """
    # Each choice is the oldest job, or one of the window of the oldest jobs with the highest priority.
    needed = candidates_needed(limits, limit)
    by_age = heapq.nsmallest(needed, waiting, key=lambda job: job.number)
    by_rank = heapq.nsmallest(needed, waiting, key=lambda job: (-job.priority, job.number))
    left, order = list({job.id: job for job in (*by_age, *by_rank)}.values()), list[Choice]()
    while len(order) < limit and (choice := choose(left, resident, limits)) is not None:
        order.append(choice)
        chosen = next(job for job in left if job.id == choice.id)
        resident = (chosen.group, *(group for group in resident if group != chosen.group))
        left = [overtaken_once(job, 0.0) if job.number < chosen.number else job for job in left if job is not chosen]
    return order


def candidates_needed(limits: OvertakeLimits, limit: int) -> int:
    """Return how many jobs must be read from the database to determine the first ``limit`` choices: that many by age,
    and that many by priority and then age."""
    return limit + _window(limits)


def _window(limits: OvertakeLimits) -> int:
    return max(1, int(limits.overtakes * WINDOW_FACTOR))


def overtaken_once(job: Waiting, seconds: float) -> Waiting:
    """Return the job with counts that include one more later job, which computed for ``seconds`` before it."""
    return Waiting(job.id, job.number, job.group, job.priority, job.overtaken + 1, job.delayed + seconds)
