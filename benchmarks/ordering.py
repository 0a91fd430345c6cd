"""How many switches the queue's order saves, and what waiting costs: 10,000 simulated jobs over 20 models.

``python benchmarks/ordering.py``. Models are asked for by Zipf's law with exponent 1. A job computes for 2.0 s and a
switch takes 0.5 s, unless ``--job`` and ``--switch`` say otherwise (``make bench`` measures switches). Arrivals:
*steady*, Poisson at 90 % of what first come, first served can do with all slots; *bursts*, 200 jobs for each slot at
once with pauses, the same load; *five people*, a burst of 1,000 jobs by one of them, and jobs of four others that come
steadily and are half of the load. ``--slots 1 2 4 8`` says how many devices there are, ``--room`` how many checkpoints
fit into the memory of each.

Orders: first come, first served; SwarmUI's rule (10 × queued requests for the model + seconds waited, at each switch);
InvokeAI's (people in turn, and of a person's 32 oldest jobs a warm model first); Safelight's, with bounds of 32, 64 and
128 overtakes and a lead of 60 s between people. Each free slot asks for its next job.

*use*: the share of the slots' time in which they compute, until the last job has ended. *most behind*: the longest wait
of any job of the four people who queue little.

Predicted before the first run with several slots: Safelight with a bound of 64 needs half of InvokeAI's switches at 4
slots, because a model that a slot holds is left to it; the worst wait is that of InvokeAI.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from safelight.queue.order import Costs, OvertakeLimits, SlotView, Waiting, choose, overtaken_once
from safelight.queue.shares import Shares

JOBS, MODELS, LOAD, BURST = 10_000, 20, 0.9, 200
HEAVY = "heavy"
"""The person who queues 1,000 jobs at once."""


@dataclass(frozen=True)
class Arrival:
    number: int
    at: float
    group: str
    person: str = ""


@dataclass
class State:
    """What a rule chooses from.

    ``came``: when each job arrived. ``turns``: the people in the order of their turns (InvokeAI's rule).
    """

    waiting: list[Waiting]
    slots: list[SlotView]
    now: float
    came: dict[int, float]
    costs: Costs
    shares: Shares
    turns: deque[str] = field(default_factory=deque[str])


Rule = Callable[[State, int], int | None]
"""The number of the next job for a slot, given by its place; None to leave the jobs for others."""


def first_come(given: State, _: int) -> int:
    return min(job.number for job in given.waiting)


def swarm(given: State, place: int) -> int:
    resident = given.slots[place].resident
    same = [job.number for job in given.waiting if job.group in resident[:1]]
    if same:
        return min(same)
    counts = Counter(job.group for job in given.waiting)
    waited = {g: max(given.now - given.came[job.number] for job in given.waiting if job.group == g) for g in counts}
    group = max(counts, key=lambda g: 10 * counts[g] + waited[g])
    return min(job.number for job in given.waiting if job.group == group)


def invoke(given: State, place: int) -> int:
    present = {job.person for job in given.waiting}
    for person in sorted(present - set(given.turns)):
        given.turns.append(person)
    while given.turns[0] not in present:
        given.turns.rotate(-1)
    person = given.turns[0]
    given.turns.rotate(-1)
    window = sorted((job for job in given.waiting if job.person == person), key=lambda job: job.number)[:32]
    warm = given.slots[place].resident
    return next((job.number for job in window if job.group in warm), window[0].number)


def ours(overtakes: int) -> Rule:
    limits = OvertakeLimits(overtakes, float("inf"))

    def rule(given: State, place: int) -> int | None:
        others = [slot for at, slot in enumerate(given.slots) if at != place]
        leads = given.shares.leads({job.person for job in given.waiting})
        choice = choose(given.waiting, given.slots[place], limits, others, leads, given.costs)
        return None if choice is None else int(choice.id)

    return rule


RULES: dict[str, Rule] = {
    "first come, first served": first_come,
    "SwarmUI's rule": swarm,
    "InvokeAI's rule": invoke,
    "Safelight, `queue_overtakes: 32`": ours(32),
    "Safelight, `queue_overtakes: 64`": ours(64),
    "Safelight, `queue_overtakes: 128`": ours(128),
}


def arrivals(kind: str, slots: int, job: float, switch: float, count: int, seed: int = 0) -> list[Arrival]:
    chance = random.Random(seed)
    weights = [1 / rank for rank in range(1, MODELS + 1)]
    shares = [weight / sum(weights) for weight in weights]
    each = (job + switch * (1 - sum(share**2 for share in shares))) / slots
    made, now = list[Arrival](), 0.0
    if kind == "five people":
        heavy = min(1000, count // 4)
        made = [Arrival(n, 0.0, _group(chance, weights), HEAVY) for n in range(heavy)]
        for number in range(heavy, count):
            now += chance.expovariate(LOAD / 2 / each)
            made.append(Arrival(number, now, _group(chance, weights), f"person {chance.randrange(4)}"))
        return made
    for number in range(count):
        if kind == "bursts":
            burst = BURST * slots
            now = number // burst * burst * each / LOAD
        else:
            now += chance.expovariate(LOAD / each)
        made.append(Arrival(number, now, _group(chance, weights)))
    return made


def _group(chance: random.Random, weights: list[float]) -> str:
    return str(chance.choices(range(MODELS), weights)[0])


def simulate(
    rule: Rule, coming: list[Arrival], job: float, switch: float, room: int, slots: int = 1
) -> dict[str, float]:
    """Run all jobs; return the counts and waits."""
    given = State(
        [],
        [SlotView(str(place)) for place in range(slots)],
        0.0,
        {arrival.number: arrival.at for arrival in coming},
        Costs(lambda _: switch, lambda _: job),
        Shares(),
    )
    ends: list[tuple[float, int]] = []
    idle = list(range(slots))
    waits, little, overtaken = list[float](), [0.0], 0
    switches, at, busy = 0, 0, 0.0
    while at < len(coming) or given.waiting or ends:
        nexts = [coming[at].at] if at < len(coming) else []
        nexts += [ends[0][0]] if ends else []
        given.now = min(nexts) if nexts else given.now
        while at < len(coming) and coming[at].at <= given.now:
            one = coming[at]
            given.waiting.append(Waiting(str(one.number), one.number, one.group, person=one.person))
            at += 1
        while ends and ends[0][0] <= given.now:
            idle.append(heapq.heappop(ends)[1])
        # The slot that has been free longest asks first: its model is the one that nobody wanted for longest.
        for place in list(idle):
            if not given.waiting:
                break
            free_in = {busy_place: until - given.now for until, busy_place in ends}
            given.slots = [
                SlotView(slot.name, slot.resident, free_in.get(number, 0.0)) for number, slot in enumerate(given.slots)
            ]
            number = rule(given, place)
            if number is None:
                continue
            idle.remove(place)
            chosen = next(one for one in given.waiting if one.number == number)
            waits.append(given.now - given.came[number])
            if chosen.person not in ("", HEAVY):
                little.append(waits[-1])
            overtaken = max(overtaken, chosen.overtaken)
            resident = given.slots[place].resident
            took = job + (0.0 if chosen.group in resident else switch)
            switches += chosen.group not in resident
            busy += took
            given.shares.charge(chosen.person, took)
            heapq.heappush(ends, (given.now + took, place))
            kept = [chosen.group, *(group for group in resident if group != chosen.group)][:room]
            given.slots[place] = SlotView(str(place), tuple(kept))
            given.waiting = [
                overtaken_once(one, took) if one.number < number and one.person == chosen.person else one
                for one in given.waiting
                if one is not chosen
            ]
    waits.sort()
    return {
        "switches": switches,
        "median": statistics.median(waits),
        "p99": waits[int(len(waits) * 0.99)],
        "worst": waits[-1],
        "behind": max(little),
        "overtaken": overtaken,
        "use": busy / slots / given.now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=JOBS, help="that are asked for")
    parser.add_argument("--job", type=float, default=2.0, help="seconds of computing a job takes")
    parser.add_argument("--room", type=int, default=1, help="checkpoints that fit into memory")
    parser.add_argument("--switch", type=float, default=0.5, help="seconds a switch takes")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8], help="devices")
    asked = parser.parse_args()
    print("| slots | arrivals | order | switches | of InvokeAI's | wait s: median | 99 % | worst | use | most behind |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for slots in asked.slots:
        for kind in ("steady", "bursts", "five people"):
            coming = arrivals(kind, slots, asked.job, asked.switch, asked.jobs)
            got = {
                name: simulate(rule, coming, asked.job, asked.switch, asked.room, slots) for name, rule in RULES.items()
            }
            base = max(1.0, got["InvokeAI's rule"]["switches"])
            for name, one in got.items():
                behind = f"{one['behind']:.1f}" if kind == "five people" else "–"
                print(
                    f"| {slots} | {kind} | {name} | {one['switches']:.0f} | {one['switches'] / base:.2f} "
                    f"| {one['median']:.1f} | {one['p99']:.1f} | {one['worst']:.1f} | {one['use']:.0%} | {behind} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
