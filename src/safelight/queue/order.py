"""Choose the next job of a free slot: jobs that need the same weights run together, within bounds. No torch, no I/O.

A *slot* is a device with its worker. Each free slot asks for its next job. The rules, in their order:

1. People take turns. A person whose jobs were computed for ``lead`` seconds more than those of another person with work
   waits. So nobody with work is behind the others by more than ``lead`` seconds, and the jobs that ran then.
2. Among a person's own jobs: a job is due when ``overtakes`` later ones started before it, or when later ones computed
   for ``seconds`` while it waited. No slot starts a later job of the person before a due one. This also holds for a
   slot that may not run the due one, because it failed there. So at most ``overtakes`` of a person's later jobs
   overtake a job, over all slots together. If none is due, those with the highest priority come first. Of these, the
   oldest are candidates (the window, ``WINDOW_FACTOR`` x ``overtakes``). With more candidates, old jobs would
   become due sooner. They would then run in order of arrival, often with a switch for each.
3. Of all candidates, one whose model the slot holds.
4. Else the job that has waited longest, on the slot that has been free longest, because its model is wanted least. If
   another slot holds the job's model, this one takes it only if the predicted switch is quicker than waiting for that
   slot. So a model that many wait for comes to a second slot, and no other does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

OVERTAKES = 64
SECONDS = 600.0
LEAD = 60.0

WINDOW_FACTOR = 1.25
"""The window of candidates as a multiple of the allowed overtakes (`benchmarks/ordering.py` compared other values)."""


@dataclass(frozen=True, slots=True)
class OvertakeLimits:
    """The bounds.

    ``overtakes``: how many of a person's later jobs may overtake a job; 0 is first come, first served.
    ``seconds``: for how long later jobs of the same person may compute while a job waits.
    ``lead``: for how many seconds a person's jobs may compute more than those of another person with work.
    """

    overtakes: int = OVERTAKES
    seconds: float = SECONDS
    lead: float = LEAD


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting job; its fields are those of :class:`safelight.queue.job.QueuedJob`.

    ``slot``: where it ran before and did not end; another slot tries it. "" if it has not run.
    """

    id: str
    number: int
    group: str
    priority: int = 0
    overtaken: int = 0
    delayed: float = 0.0
    person: str = ""
    slot: str = ""


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot at the moment of a choice.

    ``resident``: the groups whose weights are in its memory, the most recently used first. The first one of a busy slot
    is that of its job.
    ``free_in``: the predicted seconds until its job ends; 0 for a free slot.
    ``free_for``: the seconds since its last job ended; 0 for a busy slot.
    """

    name: str = ""
    resident: tuple[str, ...] = ()
    free_in: float = 0.0
    free_for: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Predictions in seconds, by group: of a switch to it, and of a job."""

    switch: Callable[[str], float] = field(default=lambda _: 1.0)
    job: Callable[[str], float] = field(default=lambda _: 1.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """The next job, and the rule that chose it."""

    id: str
    reason: str


UNMEASURED = Costs()
NO_LEADS: Mapping[str, float] = {}

_by_age = attrgetter("number")


def choose(
    waiting: Sequence[Waiting],
    slot: SlotView,
    limits: OvertakeLimits,
    others: Sequence[SlotView] = (),
    leads: Mapping[str, float] = NO_LEADS,
    costs: Costs = UNMEASURED,
) -> Choice | None:
    """Return the next job of ``waiting`` for a free slot. None when no job waits, or all are left for other slots.

    ``others``: the other slots.
    ``leads``: by person, the seconds for which their jobs computed more than those of another one (:class:`Shares`).
    The same arguments always give the same choice.
    """
    jobs: dict[str, list[Waiting]] = {}
    for job in sorted(waiting, key=_by_age):
        jobs.setdefault(job.person, []).append(job)
    tried_here = slot.name if others else ""
    runnable = {person: [job for job in own if not job.slot or job.slot != tried_here] for person, own in jobs.items()}
    least = min((leads.get(person, 0.0) for person, own in runnable.items() if own), default=None)
    if least is None:
        return None
    due: dict[str, str] = {}
    candidates: list[Waiting] = []
    for person, own in jobs.items():
        if leads.get(person, 0.0) - least > limits.lead:
            continue
        # An older job does not overtake a later one. So the oldest of a person's due jobs is next, or one before it.
        first_due = next((job for job in own if _due(job, limits)), None)
        free = runnable[person]
        if first_due is not None and (not first_due.slot or first_due.slot != tried_here):
            due[first_due.id] = _due(first_due, limits)
            candidates.append(first_due)
            continue
        if first_due is not None:
            # Another slot has to run the due job, so this one starts no later job of the person.
            free = [job for job in free if job.number < first_due.number]
        most = max((job.priority for job in free), default=0)
        candidates += [job for job in free if job.priority == most][: _window(limits)]
    candidates.sort(key=lambda job: (leads.get(job.person, 0.0), job.number))
    resident = set(slot.resident)
    here = [job for job in candidates if job.group in resident]
    if here:
        first = min(here, key=lambda job: slot.resident.index(job.group))
        return Choice(first.id, due.get(first.id, "its model is in memory"))
    free_longer = [other.name for other in others if other.free_for > slot.free_for and not other.free_in]
    ahead: dict[str, int] = {}
    for job in candidates:
        if any(name != job.slot for name in free_longer):
            continue
        waits = _wait(job, ahead.get(job.group, 0), others, costs)
        if job.id in due or waits is None:
            return Choice(job.id, due.get(job.id, "it has waited longest"))
        switch = costs.switch(job.group)
        if switch < waits[1]:
            compared = f"a switch of {switch:.1f} s is quicker than waiting {waits[1]:.1f} s for it"
            return Choice(job.id, f"{waits[0]} has its model, and {compared}")
        ahead[job.group] = ahead.get(job.group, 0) + 1
    return None


def in_order(
    waiting: Sequence[Waiting],
    slots: Sequence[SlotView],
    limits: OvertakeLimits,
    limit: int,
    leads: Mapping[str, float] = NO_LEADS,
    costs: Costs = UNMEASURED,
) -> Iterator[tuple[Choice, str]]:
    """Yield the first ``limit`` jobs of ``waiting`` in the order in which they start if no other job arrives.

    Each has the name of its slot.

    The prediction ignores the limit by time (``seconds``), because run times are only predicted.
    The cost grows with ``limit``, not with the number of waiting jobs.
    """
    left = _first_of_each(waiting, candidates_needed(limits, limit))
    running, ahead, now = list(slots), dict(leads), 0.0
    while left and limit:
        views = [_at(slot, now) for slot in running]
        for place in sorted(range(len(running)), key=lambda at: running[at].free_in):
            # All free slots ask, in the order in which they became free.
            if running[place].free_in > now:
                continue
            slot, others = views[place], [*views[:place], *views[place + 1 :]]
            choice = choose(left, slot, limits, others, ahead, costs)
            if choice is not None:
                break
        else:
            # They ask again when a job ends. If none runs, no slot starts what is left.
            ends = [slot.free_in for slot in running if slot.free_in > now]
            if not ends:
                return
            now = min(ends)
            continue
        limit -= 1
        yield choice, slot.name
        chosen = next(job for job in left if job.id == choice.id)
        took = costs.job(chosen.group) + (0.0 if chosen.group in slot.resident else costs.switch(chosen.group))
        ahead[chosen.person] = ahead.get(chosen.person, 0.0) + took
        resident = (chosen.group, *(group for group in slot.resident if group != chosen.group))
        running[place] = SlotView(slot.name, resident, now + took)
        left = after_start(left, chosen)


def _at(slot: SlotView, now: float) -> SlotView:
    """Return a slot as it is ``now`` seconds later, if it starts no job until then."""
    since = now - slot.free_in
    return replace(slot, free_in=0.0, free_for=slot.free_for + since) if since >= 0 else replace(slot, free_in=-since)


def after_start(waiting: Iterable[Waiting], started: Waiting) -> list[Waiting]:
    """Return the jobs that still wait after one of them started: it overtook the older jobs of its person."""
    return [
        overtaken_once(job, 0.0) if job.number < started.number and job.person == started.person else job
        for job in waiting
        if job.id != started.id
    ]


def candidates_needed(limits: OvertakeLimits, limit: int) -> int:
    """Return how many jobs of each person must be read from the database to determine the first ``limit`` choices: that
    many by age, and that many by priority and then age."""
    return limit + _window(limits)


def overtaken_once(job: Waiting, seconds: float) -> Waiting:
    """Return the job with counts that include one more later job, which computed for ``seconds`` before it."""
    return replace(job, overtaken=job.overtaken + 1, delayed=job.delayed + seconds)


def _due(job: Waiting, limits: OvertakeLimits) -> str:
    """Return why no later job of the same person may start before a job; "" if one may."""
    if job.overtaken >= limits.overtakes:
        return f"{job.overtaken} later jobs overtook it, and no more may"
    if job.delayed >= limits.seconds:
        return f"later jobs delayed it by {job.delayed:.0f} s, and no more may"
    return ""


def _wait(job: Waiting, ahead: int, others: Sequence[SlotView], costs: Costs) -> tuple[str, float] | None:
    """Return the slot that holds a job's model and is free soonest, and the seconds until it would start the job.

    ``ahead``: jobs of the same group that come before it. None if no slot that may run it holds the group.
    """
    holders = [slot for slot in others if job.group in slot.resident and slot.name != job.slot]
    if not holders:
        return None
    soonest = min(holders, key=lambda slot: slot.free_in)
    return soonest.name, soonest.free_in + ahead * costs.job(job.group) / len(holders)


def _first_of_each(waiting: Iterable[Waiting], count: int) -> list[Waiting]:
    """Return, of each person's jobs, the first by age, and the first by priority and then age."""
    of: dict[str, list[Waiting]] = {}
    for job in waiting:
        of.setdefault(job.person, []).append(job)
    kept: dict[str, Waiting] = {}
    for jobs in of.values():
        kept |= {job.id: job for job in heapq.nsmallest(count, jobs, key=_by_age)}
        kept |= {job.id: job for job in heapq.nsmallest(count, jobs, key=lambda job: (-job.priority, job.number))}
    return list(kept.values())


def _window(limits: OvertakeLimits) -> int:
    return max(1, int(limits.overtakes * WINDOW_FACTOR))
