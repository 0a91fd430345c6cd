"""Seconds that commands take from their start, in processes of their own, by turns.

``python benchmarks/startup.py [--runs N] [--before COMMIT]``: ``safelight --help``, ``safelight models list``, and
``safelight generate`` to the end of its first denoising step, beside ``import torch`` alone. With ``--before``, the
source of an earlier commit runs too, in the same environment. A user's environment (``pip install safelight``) lacks
packages for development, some of which others import if they are there. ``--runs 0`` prints the first round, which is
otherwise left out because it compiles modules and measures the attention kernels.

Predicted: 0.25 s for ``--help``, 0.4 s for ``models list``, and for the first step 1.5 s more than ``import torch``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from versions import HOME, checkout

FIRST_STEP = """
import os, sys
from safelight.request import results

def begin(self, *values, _begin=results.Progress.__init__, **named):
    _begin(self, *values, **named)
    if self.stage == "denoise" and self.step >= 1:
        os._exit(0)

results.Progress.__init__ = begin
sys.argv = ["safelight", "generate", "red apple", "-m", "starter-noto", "--steps", "4",
    "--out", os.environ["SAFELIGHT_ROOT"]]
from safelight.launch import run
run()
sys.exit("no denoising step was reported")
"""
"""Ends the process at the first denoising step."""

COMMAND = "import sys; sys.argv = ['safelight', *sys.argv[1:]]; from safelight.launch import run; run()"

COMMANDS = {
    "`safelight --help`": (COMMAND, "--help"),
    "`safelight models list`": (COMMAND, "models", "list"),
    "`safelight generate` to the end of the first step": (FIRST_STEP,),
}


def seconds(code: Sequence[str], source: Path, root: Path) -> float:
    """Return how long a program takes. ``source``: Safelight's folder ``src``. ``root``: where it keeps its data."""
    environment = {**os.environ, "PYTHONPATH": str(source), "SAFELIGHT_ROOT": str(root)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    command = [sys.executable, "-P", "-c", *code]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(code[1:]) or 'generate'}: {done.stderr[-2000:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--before", metavar="COMMIT", help="measure the source of this commit, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {"this checkout": HOME / "src"}
        if asked.before:
            (Path(folder) / "before").mkdir()
            sources = {asked.before[:9]: checkout(asked.before, Path(folder) / "before").home / "src"} | sources
        rows = {("`import torch`", ""): (("import torch",), HOME / "src")}
        rows |= {(label, name): (code, source) for label, code in COMMANDS.items() for name, source in sources.items()}
        taken: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
        for _ in range(asked.runs + 1):
            for row, (code, source) in rows.items():
                taken[row].append(seconds(code, source, Path(folder) / "root"))
    print(f"| {asked.runs} runs | | median s | worst s |\n|---|---|---|---|")
    for (label, name), values in taken.items():
        counted = values[1:] or values
        print(f"| {label} | {name} | {statistics.median(counted):.3f} | {max(counted):.3f} |")


if __name__ == "__main__":
    main()
