"""The long versions of the checks, on the starters; writes their figures to docs/proof.md.

``make proof``, or ``python tools/proof.py FILE``. Each lane is a process of its own, so that its memory is its own. A
lane switches between the three starters at two steps an image; every image must equal the first of its model. The exit
code is 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LANES = {
    "plain": (300, "nothing else happens"),
    "room for one": (100, "the memory limit holds one checkpoint: each switch reads files"),
    "poisoned": (100, "fresh memory is filled with NaN before anybody writes it"),
    "exceptions": (100, "every third image an exception is thrown inside a convolution"),
    "kept": (100, "a reference to every pipeline is kept on purpose"),
    "shaken": (100, "global random state and thread count are changed before every image"),
    "bf16": (100, "in bfloat16"),
}
GROWTH_MB = 20
"""Most that resident memory may grow between switch 20 and the last."""


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def lane(name: str) -> dict[str, Any]:
    """One lane: how many images, how many that differ, memory after switch 20 and after the last."""
    import torch
    from torch import nn

    import safelight
    from safelight.arch import diffusers_fence

    if name == "room for one":
        os.environ["SAFELIGHT_MAX_CACHE_RAM_GB"] = "0.064"
    engine = safelight.open_engine()
    names = [model.name for model in engine.library.models() if model.origin == "starter"]
    precision = "bf16" if name == "bf16" else "auto"

    def make(model: str) -> str:
        request = safelight.Request("red apple", model, steps=2, precision=precision)  # type: ignore[arg-type]
        return next(engine.generate(request)).pixels_sha256

    right = {model: make(model) for model in names}
    countdown, kept = [-1], []
    if name == "poisoned":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    if name == "exceptions":
        convolve = nn.Conv2d.forward

        def failing(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise RuntimeError("a kernel failed")
            return convolve(self, x)

        nn.Conv2d.forward = failing  # type: ignore[method-assign]
    if name == "kept":
        pipeline_class = diffusers_fence._pipeline_class

        def keeping(base: str) -> Any:
            def build(**parts: object) -> Any:
                kept.append(pipeline_class(base)(**parts))
                return kept[-1]

            return build

        diffusers_fence._pipeline_class = keeping
    chance = random.Random(0)
    switches, wrong, failed, at_20 = LANES[name][0], 0, 0, 0
    model = names[0]
    start = time.perf_counter()
    for turn in range(1, switches + 1):
        model = chance.choice([other for other in names if other != model])
        countdown[0] = chance.randint(1, 120) if turn % 3 == 0 else -1
        if name == "shaken":
            torch.manual_seed(turn)
            torch.rand(chance.randrange(1000))
            random.seed(turn)
            torch.set_num_threads(chance.choice([1, 2]))
        try:
            wrong += make(model) != right[model]
        except RuntimeError:
            failed += 1
        if turn == 20:
            at_20 = resident()
    return {
        "switches": switches,
        "wrong": wrong,
        "failed": failed,
        "mb_20": at_20 / 1e6,
        "mb_last": resident() / 1e6,
        "seconds": time.perf_counter() - start,
    }


def processes() -> list[tuple[str, str]]:
    """Start-up times in seconds, medians of five, and three images by two processes."""
    rows = []
    with tempfile.TemporaryDirectory() as out:
        make = ["generate", "red apple", "--out", out, "--json"]
        aba = [*make, *(part for n in ("noto", "twemoji", "noto") for part in ("-m", f"starter-{n}"))]
        for label, command in (
            ("`safelight --help`", ["--help"]),
            ("`safelight models list`", ["models", "list"]),
            ("`safelight generate`, one starter, 1 step, whole process", [*make, "-m", "starter-noto", "--steps", "1"]),
        ):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-m", "safelight.cli", *command], check=True, capture_output=True)
                times.append(time.perf_counter() - start)
            rows.append((label, f"{sorted(times)[2]:.2f} s"))
        digests = []
        for _ in range(2):
            command = [sys.executable, "-m", "safelight.cli", *aba]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            digests.append([json.loads(line)["pixels_sha256"] for line in done.stdout.splitlines()])
        a, b, again = digests[0]
        same = a == again != b and digests[0] == digests[1]
        rows.append(("A, B, A in one process, and again in a new one", "equal" if same else "NOT EQUAL"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/proof.md"))
    parser.add_argument("--lane", choices=LANES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAFELIGHT_ROOT"] = root
        if arguments.lane:
            print(json.dumps(lane(arguments.lane)))
            return
        lines, sound = report()
    arguments.file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    raise SystemExit(0 if sound else 1)


def report() -> tuple[list[str], bool]:
    """The page, and whether all is as it must be."""
    sound = True
    libraries = ", ".join(f"{name} {version(name)}" for name in ("safelight", "torch", "diffusers", "transformers"))
    lines = [
        "# Proof",
        "",
        f"Made by `make proof` on {time.strftime('%Y-%m-%d')}: {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {libraries}. Device: CPU.",
        "",
        "Switches between the three starters, two steps an image. *Differ*: images that are not those of the first of",
        "their model. *Thrown*: images that ended in the exception that was thrown into them.",
        "",
        "| lane | what happens | switches | differ | thrown | MB after switch 20 | after the last | s an image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, what) in LANES.items():
        done = subprocess.run(
            [sys.executable, __file__, "--lane", name], check=True, capture_output=True, text=True, env=os.environ
        )
        got = json.loads(done.stdout.splitlines()[-1])
        # Kept pipelines grow by themselves: each is some Python objects, none of it weights.
        grown = got["mb_last"] - got["mb_20"]
        sound = sound and got["wrong"] == 0 and (grown < GROWTH_MB or name == "kept")
        sound = sound and (got["failed"] > 0) == (name == "exceptions")
        lines.append(
            f"| {name} | {what} | {got['switches']} | {got['wrong']} | {got['failed']} | {got['mb_20']:.1f} "
            f"| {got['mb_last']:.1f} | {got['seconds'] / got['switches']:.2f} |"
        )
    lines += ["", "| whole processes | |", "|---|---|"]
    for label, value in processes():
        sound = sound and value != "NOT EQUAL"
        lines.append(f"| {label} | {value} |")
    return lines, sound


if __name__ == "__main__":
    main()
