"""Random jobs over combinations, in one engine, in random order: each image is that of a process that has made nothing
else. Each run draws a new seed and prints it.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from support.combinations import Files, Least, forks, fresh, job, shuffled
from support.flow_combinations import COMPACT, FlowFiles, drawing_families
from support.flow_combinations import job as flow_job
from support.scale import ALL, times

import safelight
from safelight.memory.planner import Planner
from safelight.request.schema import Request

JOBS = int(os.environ.get("SAFELIGHT_JOBS", "1000"))
"""Of `make soak`."""

Draw = Callable[[random.Random], Request]
"""Draws a random job."""


def seeded() -> random.Random:
    """A generator with a new seed, which is printed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    return random.Random(seed)


def chosen(chance: random.Random, count: int) -> list[str]:
    """Families with rectified flow: ``count``, or fewer if the installed libraries lack them."""
    return chance.sample(drawing_families(), min(count, len(drawing_families())))


def of_every_family(tiny: Path, folder: Path, root: Path, names: Collection[str] = (), editors: bool = True) -> Draw:
    """Draws in turns from SD 1 and SDXL, and from families with rectified flow.

    ``names``: of these families; () for all.
    ``editors``: see :meth:`FlowFiles.make`.
    """
    files = Files.make(tiny, folder, root)
    if not drawing_families():
        return lambda chance: job(chance, files)
    flows = FlowFiles.make(folder / "flows", root, names or drawing_families(), editors)
    turns = itertools.cycle((lambda chance: flow_job(chance, flows), lambda chance: job(chance, files)))
    return lambda chance: next(turns)(chance)


def tried(root: Path, draw: Draw, chance: random.Random, jobs: int, kinds: int, new: int, least: bool = False) -> str:
    """``jobs`` of so many ``kinds``, as many as ``new`` of which are also made in a new process. ``least``: with the
    least memory with which they can be done."""
    wanted = [draw(chance) for _ in range(kinds)]
    with forks(root) as others:
        right = [others.made(request) for request in wanted]
    for at in chance.sample(range(kinds), new):
        assert fresh(root, wanted[at]) == right[at], wanted[at]
    small = Least(root) if least else None
    # Room for about two models and what lies over them, so that things come and go.
    engine = safelight.open_engine(root, max_cache_ram_gb=0.06)
    for number in range(jobs):
        at = number if jobs == kinds else chance.randrange(kinds)
        request = shuffled(chance, wanted[at])
        made = small.made(request) if small is not None else next(engine.generate(request)).pixels_sha256
        assert made == right[at], (number, request)
    different = len(set(right))
    within = f"{small.gigabytes:.4f} GB" if small is not None else "0.06 GB"
    return f"{jobs} jobs, {different} different images, weights within {within}, {new} in new processes"


def test_every_job_is_that_of_a_fresh_process(root: Path, tiny: Path, tmp_path: Path) -> None:
    chance = seeded()
    names = () if ALL else chosen(chance, 2)
    draw = of_every_family(tiny, tmp_path, root, names, editors=ALL)
    tried(root, draw, chance, jobs=times(9, 100), kinds=times(4, 30), new=times(0, 1))


@pytest.mark.full
def test_every_job_is_the_same_with_the_least_memory(root: Path, tiny: Path, tmp_path: Path) -> None:
    chance = seeded()
    names = () if ALL else chosen(chance, 1)
    draw = of_every_family(tiny, tmp_path, root, names, editors=ALL)
    tried(root, draw, chance, jobs=times(4, 20), kinds=times(2, 6), new=0, least=True)


@pytest.mark.full
def test_a_hundred_jobs_with_loras_over_quantised_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights without a LoRA stay quantised in memory."""
    names = [name for name in COMPACT if name in drawing_families()]
    if not names:
        pytest.skip("the installed libraries lack these models")
    monkeypatch.setattr(Planner, "most_weight_bytes", lambda *_: 0)
    files = FlowFiles.make(tmp_path / "flows", root, names)

    def draw(chance: random.Random) -> Request:
        while True:
            request = flow_job(chance, files)
            if request.model.endswith("-quantised") and request.loras:
                return request

    tried(root, draw, seeded(), jobs=100, kinds=30, new=3)


@pytest.mark.proof
def test_a_thousand_jobs_are_those_of_fresh_processes(root: Path, tiny: Path, tmp_path: Path) -> None:
    print(tried(root, of_every_family(tiny, tmp_path, root), seeded(), jobs=JOBS, kinds=JOBS, new=10))


@pytest.mark.proof
def test_a_thousand_jobs_with_the_least_memory_are_too(root: Path, tiny: Path, tmp_path: Path) -> None:
    print(tried(root, of_every_family(tiny, tmp_path, root), seeded(), jobs=JOBS, kinds=JOBS, new=10, least=True))
