"""Which job is next: those that need the same weights together, within a stated bound. Pure.

The bound: a job is chosen at once when ``overtakes`` later jobs were started before it, or when later jobs computed for
``seconds`` seconds while it waited. So no job is ever overtaken by more than ``overtakes`` later ones, and none waits
more than ``seconds`` (and the rest of the job that passed them) longer than if all had been done in order of arrival.
Within the bound, what needs no switch comes first, among the oldest jobs only: who looks further ahead reaches the
bound sooner, and then has to switch for each. When there is nothing of that kind, the oldest. Priority comes before
grouping, and counts as overtaking.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

OVERTAKES = 64
SECONDS = 600.0

AHEAD = 1.25
"""Times the overtakes that are allowed: so many of the oldest are looked at (`benchmarks/ordering.py` tried others)."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The bound; 0 overtakes is first come, first served."""

    overtakes: int = OVERTAKES
    seconds: float = SECONDS


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits: see :class:`safelight.jobs.job.Job`."""

    id: str
    number: int
    group: str
    priority: int = 0
    overtaken: int = 0
    delayed: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The job that is next, and the rule that said so."""

    id: str
    reason: str


def choose(waiting: Sequence[Waiting], at_hand: Sequence[str], rules: Rules) -> Choice | None:
    """The next of ``waiting``; None when nothing waits. ``at_hand``: the groups whose weights are in memory, the one
    that was used last first.

    The same arguments always give the same choice.
    """
    if not waiting:
        return None
    oldest = min(waiting, key=lambda job: job.number)
    # Whoever came earlier was overtaken by at least as many: looking at the oldest looks at all.
    if oldest.overtaken >= rules.overtakes:
        return Choice(oldest.id, f"{oldest.overtaken} later ones went before it, and no more may")
    if oldest.delayed >= rules.seconds:
        return Choice(oldest.id, f"later ones delayed it by {oldest.delayed:.0f} s, and may no longer")
    most = max(job.priority for job in waiting)
    first = (job for job in waiting if job.priority == most)
    ranked = heapq.nsmallest(_window(rules), first, key=lambda job: job.number)
    place = {group: number for number, group in reversed(list(enumerate(at_hand)))}
    first = min(ranked, key=lambda job: (place.get(job.group, len(place)), job.number))
    if first.group in place:
        return Choice(first.id, "its model is at hand")
    return Choice(first.id, "has waited longest")


def in_order(waiting: Sequence[Waiting], at_hand: Sequence[str], rules: Rules, limit: int) -> list[Choice]:
    """The first ``limit`` of ``waiting`` as they will be started if nothing else comes, and why; delays by time are not
    foreseen. What it costs grows with the limit, not with what waits."""
    # A choice is the oldest, or one of a window of the oldest of those with the highest priority.
    reach = reached(rules, limit)
    by_age = heapq.nsmallest(reach, waiting, key=lambda job: job.number)
    by_rank = heapq.nsmallest(reach, waiting, key=lambda job: (-job.priority, job.number))
    left, order = list({job.id: job for job in (*by_age, *by_rank)}.values()), list[Choice]()
    while len(order) < limit and (choice := choose(left, at_hand, rules)) is not None:
        order.append(choice)
        chosen = next(job for job in left if job.id == choice.id)
        at_hand = (chosen.group, *(group for group in at_hand if group != chosen.group))
        left = [passed(job, 0.0) if job.number < chosen.number else job for job in left if job is not chosen]
    return order


def reached(rules: Rules, limit: int) -> int:
    """How many of the oldest, and of the oldest with the highest priority, the first ``limit`` choices look at."""
    return limit + _window(rules)


def _window(rules: Rules) -> int:
    return max(1, int(rules.overtakes * AHEAD))


def passed(job: Waiting, seconds: float) -> Waiting:
    """The job after a later one was started before it, and computed for ``seconds``."""
    return Waiting(job.id, job.number, job.group, job.priority, job.overtaken + 1, job.delayed + seconds)
