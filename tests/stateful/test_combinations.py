"""Random jobs over combinations, in one engine, in random order: each image is that of a process that has made nothing
else. The seed is drawn anew each time, and printed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.combinations import Files, Least, forks, fresh, job, shuffled
from support.scale import times

import safelight


def tried(root: Path, tiny: Path, folder: Path, jobs: int, kinds: int, new: int, least: bool = False) -> str:
    """``jobs`` of so many ``kinds``, as many as ``new`` of which are also made in a new process. ``least``: with the
    least memory with which they can be done."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    chance, files = random.Random(seed), Files.make(tiny, folder, root)
    wanted = [job(chance, files) for _ in range(kinds)]
    with forks(root) as others:
        right = [others.made(request) for request in wanted]
    for at in chance.sample(range(kinds), new):
        assert fresh(root, wanted[at]) == right[at], (seed, wanted[at])
    small = Least(root) if least else None
    # Room for about two models and what lies over them, so that things come and go.
    engine = safelight.open_engine(root, max_cache_ram_gb=0.06)
    for number in range(jobs):
        at = number if jobs == kinds else chance.randrange(kinds)
        request = shuffled(chance, wanted[at])
        made = small.made(request) if small is not None else next(engine.generate(request)).pixels_sha256
        assert made == right[at], (seed, number, request)
    different = len(set(right))
    within = f"{small.gigabytes:.4f} GB" if small is not None else "0.06 GB"
    return f"{jobs} jobs, {different} different images, weights within {within}, {new} in new processes, seed {seed}"


def test_every_job_is_that_of_a_fresh_process(root: Path, tiny: Path, tmp_path: Path) -> None:
    tried(root, tiny, tmp_path, jobs=times(8, 80), kinds=times(3, 8), new=times(0, 1))


def test_every_job_is_the_same_with_the_least_memory(root: Path, tiny: Path, tmp_path: Path) -> None:
    tried(root, tiny, tmp_path, jobs=times(4, 20), kinds=times(2, 6), new=0, least=True)


@pytest.mark.proof
def test_a_thousand_jobs_are_those_of_fresh_processes(root: Path, tiny: Path, tmp_path: Path) -> None:
    print(tried(root, tiny, tmp_path, jobs=1000, kinds=1000, new=10))


@pytest.mark.proof
def test_a_thousand_jobs_with_the_least_memory_are_too(root: Path, tiny: Path, tmp_path: Path) -> None:
    print(tried(root, tiny, tmp_path, jobs=1000, kinds=1000, new=10, least=True))
