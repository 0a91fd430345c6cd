"""Every tool and benchmark still runs: the smallest thing that each can be asked for, in seconds.

What needs checkpoints of full size or other programs' environments is imported, and its command line read.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
sys.path[:0] = [str(HOME / "tools"), str(HOME / "benchmarks"), str(HOME / "starter")]

import proof  # noqa: E402

PROGRAMS = sorted(
    path.relative_to(HOME).as_posix() for folder in ("tools", "benchmarks") for path in (HOME / folder).glob("*.py")
)
RECIPE = sorted(path.stem for path in (HOME / "starter/recipe").glob("*.py") if path.stem != "__init__")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=HOME,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HOME / "tests"), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("lane", proof.LANES)
def test_lanes_of_the_proof(lane: str, tmp_path: Path) -> None:
    got = json.loads(run("tools/proof.py", "--lane", lane, "--switches", "3").splitlines()[-1])
    assert (got["switches"], got["wrong"]) == (3, 0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import(program: str) -> None:
    """By name, so that what each defines and imports is there; none does anything by being imported."""
    assert importlib.import_module(Path(program).stem).__doc__


@pytest.mark.parametrize("part", RECIPE)
def test_parts_of_the_recipe_import(part: str) -> None:
    assert importlib.import_module(f"recipe.{part}").__doc__


def test_ordering() -> None:
    printed = run("benchmarks/ordering.py", "--jobs", "300")
    assert printed.count("| bursts |") == printed.count("| steady |") == 6


def test_trust(tmp_path: Path) -> None:
    assert "| starter |" in run("benchmarks/trust.py", "--images", "2")


def test_contention() -> None:
    assert "beside a busy process" in run("benchmarks/contention.py", "--times", "1", "--steps", "2")


def test_index() -> None:
    assert "| models list |" in run("benchmarks/library.py", "--models", "5", "--adapters", "5")


def test_the_soak_of_random_sequences() -> None:
    assert "sequences" in run("tools/soak.py", "1", "--sequences", "2")
