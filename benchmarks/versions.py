"""Compares an earlier commit with this checkout: the same benchmark rows of both, by turns, as ratios.

``python benchmarks/versions.py COMMIT``. Each row runs in a process of its own, alternately with each version's own
script and source, in this checkout's environment. A row with several values is printed as several lines. The noise of a
line is the spread of its values within a version. Rows of full size need the checkpoints of ``benchmarks/switching.py``
(4 GB). ``--rows`` chooses rows by their names.

Predicted: no line is slower by more than its noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = HERE.parent
FOLDER = HOME / "build/bench"
CHECKPOINTS = ("A", "B", "A.safetensors", "B.safetensors")

ADAPTERS = (
    "import json, adapters\n"
    "model, paths = adapters.prepared()\n"
    "print(json.dumps(adapters.ours(model.name if model.origin != 'path' else str(model.path), paths)))\n"
)

ROWS: Mapping[str, tuple[str, ...]] = {
    "switching, one file, fp32": ("switching.py", "--row", "safelight-file", "--dtype", "fp32", "--switches", "8"),
    "switching, one file, bf16": ("switching.py", "--row", "safelight-file", "--dtype", "bf16", "--switches", "8"),
    "switching, folder, fp32": ("switching.py", "--row", "safelight-folder", "--dtype", "fp32", "--switches", "8"),
    "memory, both fit": ("memory.py", "--row", "both fit"),
    "memory, a quarter": ("memory.py", "--generate", "A", "256", "4", "0.53"),
    "memory, overlap": ("memory.py", "--row", "overlap, equal layers"),
    "adapters, two LoRAs": ("-c", ADAPTERS),
    "trust": ("trust.py", "--images", "15"),
    "serving": ("serving.py", "--no-crowd"),
    "library": ("library.py", "--models", "300", "--adapters", "1000"),
}
"""Arguments of Python, in each version's folder of benchmarks."""

TRIES = 6
"""Of a row: until 2026-11, ``serving.py`` failed if its client missed the event of a job's first step."""

FULL = frozenset(name for name in ROWS if name.split(",")[0] in ("switching", "memory", "adapters"))
"""Rows that need the checkpoints."""

_CELLS = re.compile(r"\| (?:[^|]*\| )?([^|]+?) \| (-?[0-9.]+)%? \|$", re.MULTILINE)


@dataclass(frozen=True)
class Version:
    """``home``: the folder with its source and its benchmarks."""

    name: str
    home: Path

    def run(self, arguments: tuple[str, ...]) -> dict[str, float]:
        """Run a row. Returns its values by their labels."""
        where = self.home / "benchmarks"
        paths = (self.home / "src", where, self.home / "tests")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, *arguments]
        for _ in range(TRIES):
            done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
            if not done.returncode:
                return values(done.stdout)
            print(f"{self.name}: {' '.join(arguments)[:60]} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        raise SystemExit(f"{self.name}: {' '.join(arguments)[:60]} failed {TRIES} times")


def values(printed: str) -> dict[str, float]:
    """Return the numbers of what a benchmark prints: a JSON object in the last line, or cells of a table."""
    last = printed.strip().splitlines()[-1]
    if not last.startswith("{"):
        return {label: float(number) for label, number in _CELLS.findall(printed)}
    found: dict[str, float] = {}
    for name, value in json.loads(last).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, list) and value and name == "seconds":
            found["median s"] = statistics.median(map(float, value))
    return found


def checkout(commit: str, folder: Path) -> Version:
    """Write the files of a commit into a folder; the checkpoints are links."""
    archive = subprocess.run(["git", "archive", commit, "src", "benchmarks", "tests", "pyproject.toml"], cwd=HOME,
                             capture_output=True, check=True).stdout  # fmt: skip
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    bench = folder / "build/bench"
    bench.mkdir(parents=True)
    for name in CHECKPOINTS:
        (bench / name).symlink_to(FOLDER / name)
    return Version("before", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    asked = parser.parse_args()
    if FULL & set(asked.rows):
        subprocess.run([sys.executable, HERE / "checkpoints.py", FOLDER], check=True)
    with tempfile.TemporaryDirectory() as folder:
        versions = (checkout(asked.commit, Path(folder)), Version("after", HOME))
        print(f"| | {asked.commit[:9]} | this checkout | ratio | noise |\n|---|---|---|---|---|")
        for row in asked.rows:
            results: dict[str, list[dict[str, float]]] = {version.name: [] for version in versions}
            for _ in range(asked.rounds):
                for version in versions:
                    results[version.name].append(version.run(ROWS[row]))
            for label in results["after"][0]:
                print_line(f"{row}: {label}", *([one.get(label) for one in results[v.name]] for v in versions))


def print_line(label: str, before: list[float | None], after: list[float | None]) -> None:
    """Print the medians of both versions, their ratio, and the larger spread within a version, as a share."""
    old, new = ([value for value in some if value is not None] for some in (before, after))
    if not old or not new:
        print(f"| {label} | {'–' if not old else ''} | | | |", flush=True)
        return
    one, other = statistics.median(old), statistics.median(new)
    ratio = f"{other / one:.2f}" if one else "–"
    spread = max((max(some) - min(some)) / abs(statistics.median(some) or 1) for some in (old, new))
    print(f"| {label} | {one:.4g} | {other:.4g} | {ratio} | {spread:.0%} |", flush=True)


if __name__ == "__main__":
    main()
