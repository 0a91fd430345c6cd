"""Run the long tests with the starters, and write their figures to docs/proof.md.

``make proof``, or ``python tools/proof.py FILE``. Each lane has its own process, so that lanes do not share memory. A
lane switches between the starters, with two steps for each image; every image must equal the first image of its
model. The exit code is 1 if any test fails. ``--section`` repeats one section, and keeps the others that the page has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LANES = {
    "plain": (300, "only the switches"),
    "room for one": (100, "the memory limit allows one checkpoint, so each switch reads files"),
    "poisoned": (100, "new memory is filled with NaN before the program writes to it"),
    "exceptions": (100, "during every third image, a convolution raises an exception"),
    "old pipelines": (100, "the test holds a reference to every pipeline on purpose"),
    "shaken": (
        100,
        "the test changes the global random state and the thread count before every image; Safelight sets its own",
    ),
    "bf16": (100, "the models compute in bfloat16"),
}
HOME = Path(__file__).resolve().parents[1]
MARK = "<!-- {name} -->"
"""The line above each section of the page."""

GROWTH_MB = 20
"""MB by which resident memory may grow between switch 20 and the last switch."""


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def lane(name: str, switches: int) -> dict[str, Any]:
    """Run one lane; how many of its images differ, and its memory after switch 20 and after the last switch."""
    import torch
    from torch import nn

    import safelight
    from safelight.pipeline import model_stages
    from safelight.pipeline.denoise import Denoised, DenoiseInputs

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
        filling: Any = torch.utils.deterministic
        filling.fill_uninitialized_memory = True
    if name == "exceptions":
        convolve = nn.Conv2d.forward

        def failing(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise RuntimeError("a kernel failed")
            return convolve(self, x)

        nn.Conv2d.forward = failing  # type: ignore[method-assign]
    if name == "old pipelines":
        denoise = model_stages.denoise

        def keeping(work: DenoiseInputs) -> Denoised:
            kept.append(work)
            return denoise(work)

        model_stages.denoise = keeping
    chance = random.Random(0)
    wrong, failed, at_20 = 0, 0, 0
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


NEIGHBOUR = """
import sys
held = None
for line in sys.stdin:
    if line.strip() == "take":
        held = bytearray(4 << 30)
        held[:: 4096] = b"x" * len(held[:: 4096])
    else:
        held = None
    print("done", flush=True)
"""


def neighbour() -> list[tuple[str, str]]:
    """Run a generation, in the middle of which a second real process takes 4 GB and gives them back.

    The limits pretend that the machine is small: its memory is the memory of the two processes plus 40 MB.
    """
    import psutil

    import safelight
    from safelight.devices import machine
    from safelight.devices.machine import MemoryLimit
    from safelight.memory.budget import HOST
    from safelight.memory.limits import HOST_RESERVE, BudgetUpdater

    engine = safelight.open_engine()
    residency = engine.resources.residency
    request = safelight.Request("red apple", "starter-noto", steps=40)
    right = next(engine.generate(request)).pixels_sha256
    other = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    size = machine.anonymous_bytes() + psutil.Process(other.pid).memory_info().rss + (4 << 30) + (40 << 20)

    def limit() -> MemoryLimit:
        used = machine.anonymous_bytes() + psutil.Process(other.pid).memory_info().rss
        return MemoryLimit(max(0, size - used), "a machine of this size")

    residency.planner.before_planning = BudgetUpdater(
        residency.ledger, HOST, limit, lambda: 0, HOST_RESERVE
    ).update_budget
    resident: list[int] = []

    def send(word: str) -> None:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(word + "\n")
        other.stdin.flush()
        other.stdout.readline()

    def look(progress: safelight.Progress) -> None:
        if progress.stage == "denoise":
            resident.append(residency.resident_bytes)
            if progress.step == 10:
                send("take")
            elif progress.step == 25:
                send("free")

    image = next(engine.generate(request, look))
    other.kill()
    same = image.pixels_sha256 == right
    before, meanwhile, after = resident[5], max(resident[11:25]), resident[-1]
    followed = meanwhile < before * 0.75 and after > meanwhile
    return [
        (
            "MB of models in memory: before, while the second process had 4 GB, and after",
            f"{before / 1e6:.0f}, {meanwhile / 1e6:.0f}, {after / 1e6:.0f}",
        ),
        ("the memory budget followed", "yes" if followed else "NO"),
        ("pixels", "equal" if same else "NOT EQUAL"),
    ]


SEQUENCES = {
    "tests/stateful/test_switching.py": (
        "2000",
        "switches, budget changes, cancellations, failed allocations, lost waits, corrupted copies and replaced files, "
        "with a model of two blocks",
    ),
    "tests/stateful/test_pipeline.py": ("100", "the same, with generations by a tiny pipeline"),
}


SERVER = {
    "tests/server/test_deaths.py::test_workers_are_killed_200_times": (
        "200",
        "the test kills the worker under load: each of 400 jobs ends once, done or with a reason; every image is right",
    ),
    "tests/server/test_deaths.py::test_servers_are_killed_20_times": (
        "20",
        "the test kills the server under load: 60 jobs; no half-written image, no file without a record, and no worker "
        "that outlives the server",
    ),
    "tests/clients/test_webuiapi.py::test_clients_at_once_200_requests_each": (
        "600",
        "two webuiapi clients and one openai client send requests at once, each for its own model: pixels and metadata "
        "are right",
    ),
}


TRUST = {
    "tests/diagnostics/test_doctor.py::test_forty_faults_and_the_right_suspects": (
        "41",
        "faults of loading, state, attention, memory and device: the doctor names the right suspect for at least 39",
    ),
    "tests/diagnostics/test_doctor.py::test_nothing_is_wrong_a_hundred_times": (
        "100",
        "examinations without a fault: the doctor reports no fault",
    ),
}


COMBINATIONS = {
    "tests/stateful/test_combinations.py::test_a_thousand_jobs_are_those_of_fresh_processes": (
        "1000",
        "random jobs in one process, with memory for about two models: each image equals the image from a forked "
        "process that has loaded no model before; 10 of them were also compared with the image of a new process, and "
        "are equal",
    ),
    "tests/stateful/test_combinations.py::test_a_thousand_jobs_with_the_least_memory_are_too": (
        "1000",
        "the same with other jobs, each with the least memory with which it can run",
    ),
}


def sequences(given: dict[str, tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """Run long tests; for each (how many sequences, of what, seconds, result)."""
    rows = []
    for path, (count, what) in given.items():
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", path, "-m", "proof", "-q", "--no-header", "-p", "no:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        passed = done.returncode == 0 and "1 passed" in done.stdout
        if not passed:
            output = [line for line in done.stdout.splitlines() if "[warning" not in line]
            print("\n".join(output)[-6000:])
        rows.append((count, what, f"{time.perf_counter() - start:.0f}", "passed" if passed else "FAILED"))
    return rows


def equal_in_two_processes(*options: str) -> bool:
    """Whether two processes make the same images A, B, A, and both images A of a process are equal."""
    models = [part for name in ("noto", "twemoji", "noto") for part in ("-m", f"starter-{name}")]
    digests: list[list[str]] = []
    with tempfile.TemporaryDirectory() as out:
        # Without a seed, each command chooses a random one.
        make = ["generate", "red apple", "--seed", "0", "--out", out, "--json", *models, *options]
        for _ in range(2):
            command = [sys.executable, "-m", "safelight.cli", *make]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            digests.append([json.loads(line)["pixels_sha256"] for line in done.stdout.splitlines()])
    a, b, again = digests[0]
    return a == again != b and digests[0] == digests[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/proof.md"))
    parser.add_argument("--lane", choices=LANES)
    parser.add_argument("--switches", type=int, help="how many switches the lane makes, instead of its default")
    parser.add_argument(
        "--section", choices=SECTIONS, action="append", help="run only this section; repeat the option for several"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAFELIGHT_ROOT"] = root
        if arguments.lane:
            print(json.dumps(lane(arguments.lane, arguments.switches or LANES[arguments.lane][0])))
            return
        done = read_sections(arguments.file)
        failed = False
        for name in arguments.section or SECTIONS:
            lines, sound = SECTIONS[name]()
            done[name] = "\n".join([*lines, "", f"*{time.strftime('%Y-%m-%d')}*"])
            failed |= not sound
            print(done[name], flush=True)
    write_page(arguments.file, done)
    raise SystemExit(1 if failed else 0)


def read_sections(page: Path) -> dict[str, str]:
    """Return the sections that a page has, by their names."""
    text = page.read_text() if page.exists() else ""
    _, *rest = re.split(MARK.format(name="([a-z]+)"), text)
    return {name: body.strip() for name, body in zip(rest[::2], rest[1::2], strict=True)}


def write_page(page: Path, sections: dict[str, str]) -> None:
    """Write a page of sections. It names those that never ran."""
    parts = ["\n".join(heading())]
    parts += [f"{MARK.format(name=name)}\n\n{sections[name]}" for name in SECTIONS if name in sections]
    parts += [f"Not run: {name}." for name in SECTIONS if name not in sections]
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def processor() -> str:
    from safelight.devices import machine

    return machine.processor()


def heading() -> list[str]:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("safelight", "torch", "diffusers", "transformers"))
    return [
        "# Proof",
        "",
        "`make proof` runs long tests and writes this page. It ran on "
        f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores, with",
        f"Python {platform.python_version()}, {libraries}. Device: CPU.",
        "",
    ]


def lanes() -> tuple[list[str], bool]:
    sound = True
    lines = [
        "Each row (*lane*) is one process that switches between the starters, with two steps for each image.",
        "*Differ* counts the images that do not equal the first image of their model. *Thrown* counts the images that",
        f"ended with the exception that the test raised. *MB* is resident memory. Growth of {GROWTH_MB} MB is a",
        "failure, except in the lane *old pipelines*, which holds Python objects.",
        "",
        "| lane | what happens | switches | differ | thrown | MB after switch 20 | MB after the last | s per image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, what) in LANES.items():
        done = subprocess.run(
            [sys.executable, __file__, "--lane", name], check=True, capture_output=True, text=True, env=os.environ
        )
        got = json.loads(done.stdout.splitlines()[-1])
        # Old pipelines take memory: each is some Python objects, but no weights.
        grown = got["mb_last"] - got["mb_20"]
        sound = sound and got["wrong"] == 0 and (grown < GROWTH_MB or name == "old pipelines")
        sound = sound and (got["failed"] > 0) == (name == "exceptions")
        lines.append(
            f"| {name} | {what} | {got['switches']} | {got['wrong']} | {got['failed']} | {got['mb_20']:.1f} "
            f"| {got['mb_last']:.1f} | {got['seconds'] / got['switches']:.2f} |"
        )
    return lines, sound


def memory() -> tuple[list[str], bool]:
    rows = neighbour()
    lines = ["| a second process takes 4 GB in the middle of a generation | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    return lines, not any(value in ("NO", "NOT EQUAL") for _, value in rows)


def states() -> tuple[list[str], bool]:
    lines = [
        "These tests run random sequences on the simulated accelerator. After each step, the memory ledger must equal",
        "the device's own count, and the result must be right or a clear error:",
        "",
        "| sequences | what they contain | s | result |",
        "|---|---|---|---|",
    ]
    return _with_rows(lines, SEQUENCES)


def server() -> tuple[list[str], bool]:
    return _with_rows(["| times | what | s | result |", "|---|---|---|---|"], SERVER)


def trust() -> tuple[list[str], bool]:
    return _with_rows(["| times | what | s | result |", "|---|---|---|---|"], TRUST)


def combinations() -> tuple[list[str], bool]:
    lines = [
        "These tests run random jobs with checkpoints (SD 1, SDXL), LoRAs, ControlNets, textual inversions, VAEs,",
        "text encoders, input images, masks, outpainting, hires fix, variations, seamless images, tiles, prompts and",
        "samplers. Each run draws new jobs:",
        "",
        "| jobs | what | s | result |",
        "|---|---|---|---|",
    ]
    return _with_rows(lines, COMBINATIONS)


def _with_rows(lines: list[str], given: dict[str, tuple[str, str]]) -> tuple[list[str], bool]:
    rows = sequences(given)
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)], all(row[-1] == "passed" for row in rows)


def processes() -> tuple[list[str], bool]:
    equal = equal_in_two_processes()
    label = "the images of A, B, A in one process, and again in a new process"
    return ["| whole processes | |", "|---|---|", f"| {label} | {'equal' if equal else 'NOT EQUAL'} |"], equal


def tests() -> tuple[list[str], bool]:
    """Run `make test-all`, without lint and types."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not proof", "-q", "--no-header"]
    environment = {name: value for name, value in os.environ.items() if name != "SAFELIGHT_ROOT"}
    done = subprocess.run(
        command, cwd=HOME, env=environment | {"TEST_SCALE": "all"}, capture_output=True, text=True, check=False
    )
    printed = done.stdout.strip().splitlines()
    failed = [line.split(" - ")[0] for line in printed if line.startswith(("FAILED ", "ERROR "))]
    lines = ["Every case of every test (`make test-all`):", "", "| tests | |", "|---|---|"]
    lines += [f"| {len(failed)} failed | {printed[-1].strip('= ') if printed else done.stderr[-200:]} |"]
    return [*lines, *(f"| {line} | |" for line in failed)], done.returncode == 0


SECTIONS = {
    "tests": tests,
    "lanes": lanes,
    "memory": memory,
    "server": server,
    "states": states,
    "combinations": combinations,
    "trust": trust,
    "processes": processes,
}
"""Each returns its lines of the page, and whether all its tests passed."""


if __name__ == "__main__":
    main()
