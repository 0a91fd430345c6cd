"""How many switches the queue's order saves, and what waiting costs: 10,000 simulated jobs over 20 models.

``python benchmarks/ordering.py``. Models are asked for by Zipf's law with exponent 1. A job computes for 2.0 s and a
switch takes 0.5 s, unless ``--job`` and ``--switch`` say otherwise (``make bench`` measures switches). Arrivals:
*steady*, Poisson at 90 % of what first come, first served can do; *bursts*, 200 jobs at once with pauses, the same
load. ``--room`` says how many checkpoints fit into memory.

Orders: first come, first served; SwarmUI's rule (10 × queued requests for the model + seconds waited, at each switch);
InvokeAI's (warm models first within the 32 oldest); Safelight's with bounds of 32, 64 and 128 overtakes.

Predicted before the first run: under steady load queues are short, so that every rule saves little more than half; in
bursts, at a bound of 32, a third of first come, first served's switches: each model must be visited once in every
32 + 1/p jobs (p its share), which adds up to 0.32 visits a job against 0.88.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from safelight.queue.order import OvertakeLimits, Waiting, choose, overtaken_once

JOBS, MODELS, LOAD, BURST = 10_000, 20, 0.9, 200


@dataclass(frozen=True)
class Arrival:
    number: int
    at: float
    group: str


@dataclass(frozen=True)
class Moment:
    """What a rule chooses from: what waits, the models at hand (the last used first), the time, when each arrived."""

    waiting: list[Waiting]
    resident: list[str]
    now: float
    came: dict[int, float]


Rule = Callable[[Moment], int]
"""The number of the next job."""


def first_come(given: Moment) -> int:
    return min(job.number for job in given.waiting)


def swarm(given: Moment) -> int:
    same = [job.number for job in given.waiting if job.group in given.resident[:1]]
    if same:
        return min(same)
    counts = Counter(job.group for job in given.waiting)
    waited = {g: max(given.now - given.came[job.number] for job in given.waiting if job.group == g) for g in counts}
    group = max(counts, key=lambda g: 10 * counts[g] + waited[g])
    return min(job.number for job in given.waiting if job.group == group)


def invoke(given: Moment) -> int:
    window = sorted(given.waiting, key=lambda job: job.number)[:32]
    return next((job.number for job in window if job.group in given.resident), window[0].number)


def ours(overtakes: int) -> Rule:
    rules = OvertakeLimits(overtakes, float("inf"))

    def rule(given: Moment) -> int:
        choice = choose(given.waiting, given.resident, rules)
        assert choice is not None
        return int(choice.id)

    return rule


RULES: dict[str, Rule] = {
    "first come, first served": first_come,
    "SwarmUI's rule": swarm,
    "InvokeAI's rule": invoke,
    "Safelight, `queue_overtakes: 32`": ours(32),
    "Safelight, `queue_overtakes: 64`": ours(64),
    "Safelight, `queue_overtakes: 128`": ours(128),
}


def arrivals(bursts: bool, job: float, switch: float, count: int, seed: int = 0) -> list[Arrival]:
    chance = random.Random(seed)
    weights = [1 / rank for rank in range(1, MODELS + 1)]
    shares = [weight / sum(weights) for weight in weights]
    each = job + switch * (1 - sum(share**2 for share in shares))
    made, now = [], 0.0
    for number in range(count):
        if bursts:
            now = number // BURST * BURST * each / LOAD
        else:
            now += chance.expovariate(LOAD / each)
        made.append(Arrival(number, now, str(chance.choices(range(MODELS), weights)[0])))
    return made


def simulate(rule: Rule, coming: list[Arrival], job: float, switch: float, room: int) -> dict[str, float]:
    came = {arrival.number: arrival.at for arrival in coming}
    waiting: list[Waiting] = []
    now, switches, at = 0.0, 0, 0
    resident: list[str] = []
    waits, overtaken = [], [0]
    while at < len(coming) or waiting:
        if not waiting:
            now = max(now, coming[at].at)
        while at < len(coming) and coming[at].at <= now:
            waiting.append(Waiting(str(coming[at].number), coming[at].number, coming[at].group))
            at += 1
        number = rule(Moment(waiting, resident, now, came))
        chosen = next(one for one in waiting if one.number == number)
        waits.append(now - came[number])
        overtaken.append(chosen.overtaken)
        switched = chosen.group not in resident
        took = job + (switch if switched else 0.0)
        switches += switched
        now += took
        resident = [chosen.group, *(group for group in resident if group != chosen.group)][:room]
        waiting = [overtaken_once(one, took) if one.number < number else one for one in waiting if one is not chosen]
    waits.sort()
    return {
        "switches": switches,
        "median": statistics.median(waits),
        "p99": waits[int(len(waits) * 0.99)],
        "worst": waits[-1],
        "overtaken": max(overtaken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=JOBS, help="that are asked for")
    parser.add_argument("--job", type=float, default=2.0, help="seconds of computing a job takes")
    parser.add_argument("--room", type=int, default=1, help="checkpoints that fit into memory")
    parser.add_argument("--switch", type=float, default=0.5, help="seconds a switch takes")
    arguments = parser.parse_args()
    print("| arrivals | order | switches | of first come | wait s: median | 99 % | worst | most overtaken |")
    print("|---|---|---|---|---|---|---|---|")
    for bursts in (False, True):
        coming = arrivals(bursts, arguments.job, arguments.switch, arguments.jobs)
        base = 0.0
        for name, rule in RULES.items():
            got = simulate(rule, coming, arguments.job, arguments.switch, arguments.room)
            base = base or got["switches"]
            label = "bursts" if bursts else "steady"
            print(
                f"| {label} | {name} | {got['switches']:.0f} | {got['switches'] / base:.0%} | {got['median']:.1f} "
                f"| {got['p99']:.1f} | {got['worst']:.1f} | {got['overtaken']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
