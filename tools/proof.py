"""The long versions of the checks, on the starters; writes their figures to docs/proof.md.

``make proof``, or ``python tools/proof.py FILE``. Each lane is a process of its own, so that its memory is its own. A
lane switches between the three starters at two steps an image; every image must equal the first of its model. The exit
code is 1 when anything is not as it must be. Each section's figures are kept in ``build/proof``, so that one can be run
anew by itself (``--section``) and the page is made of all.
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
    "shaken": (100, "global random state and thread count are changed before every image; Safelight sets its own"),
    "bf16": (100, "in bfloat16"),
}
KEPT = Path(__file__).parents[1] / "build/proof"
GROWTH_MB = 20
"""Most that resident memory may grow between switch 20 and the last."""


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def lane(name: str, switches: int) -> dict[str, Any]:
    """One lane: how many of its images differ, memory after switch 20 and after the last."""
    import torch
    from torch import nn

    import safelight
    from safelight.arch.diffusers_fence import sampling

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
    if name == "kept":
        pipeline_class = sampling.pipeline_class

        def keeping(base: str, task: str = "text") -> Any:
            def build(**parts: object) -> Any:
                kept.append(pipeline_class(base, task)(**parts))
                return kept[-1]

            return build

        sampling.pipeline_class = keeping
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
    """A second real process takes 4 GB and gives them back, in the middle of a generation.

    The machine is made to seem as small as that matters: its memory is what the two processes take, and 40 MB.
    """
    import psutil

    import safelight
    from safelight.devices import machine
    from safelight.devices.machine import Bound
    from safelight.memory.budget import HOST
    from safelight.memory.limits import HOST_RESERVE, Limits

    engine = safelight.open_engine()
    residency = engine.bench.residency
    request = safelight.Request("red apple", "starter-noto", steps=40)
    right = next(engine.generate(request)).pixels_sha256
    other = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    size = machine.anonymous_bytes() + psutil.Process(other.pid).memory_info().rss + (4 << 30) + (40 << 20)

    def bound() -> Bound:
        used = machine.anonymous_bytes() + psutil.Process(other.pid).memory_info().rss
        return Bound(max(0, size - used), "a machine of this size")

    residency.before_planning = Limits(residency.ledger, HOST, bound, lambda: 0, HOST_RESERVE).follow
    resident: list[int] = []

    def tell(word: str) -> None:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(word + "\n")
        other.stdin.flush()
        other.stdout.readline()

    def look(progress: safelight.Progress) -> None:
        if progress.stage == "denoise":
            resident.append(residency.resident_bytes)
            if progress.step == 10:
                tell("take")
            elif progress.step == 25:
                tell("free")

    image = next(engine.generate(request, look))
    other.kill()
    same = image.pixels_sha256 == right
    before, meanwhile, after = resident[5], max(resident[11:25]), resident[-1]
    followed = meanwhile < before * 0.75 and after > meanwhile
    return [
        (
            "MB resident before, while a second process had 4 GB, and after",
            f"{before / 1e6:.0f}, {meanwhile / 1e6:.0f}, {after / 1e6:.0f}",
        ),
        ("the budget followed", "yes" if followed else "NO"),
        ("pixels", "equal" if same else "NOT EQUAL"),
    ]


SEQUENCES = {
    "tests/stateful/test_switching.py": (
        "2000",
        "switch, budget, cancel, failed allocation, lost wait, corrupted copy, replaced file; two blocks",
    ),
    "tests/stateful/test_pipeline.py": ("100", "the same with generations of the tiny pipeline"),
}


SERVER = {
    "tests/server/test_deaths.py::test_workers_are_killed_200_times": (
        "200",
        "the worker is killed under load: 400 jobs, each ends once, done or with a reason; every image is right",
    ),
    "tests/server/test_deaths.py::test_servers_are_killed_20_times": (
        "20",
        "the server is killed under load: 60 jobs; no half image, no orphan, no worker that outlives it",
    ),
    "tests/clients/test_webuiapi.py::test_clients_at_once_200_requests_each": (
        "600",
        "requests by two webuiapi clients and one of openai at once, each with its model: pixels and metadata",
    ),
}


TRUST = {
    "tests/trust/test_doctor.py::test_forty_faults_and_the_right_suspects": (
        "41",
        "faults over the four suspects and the device: the doctor names the right one for all but at most two",
    ),
    "tests/trust/test_doctor.py::test_nothing_is_wrong_a_hundred_times": (
        "100",
        "examinations with nothing wrong: no alarm",
    ),
}


COMBINATIONS = {
    "tests/stateful/test_combinations.py::test_a_thousand_jobs_are_those_of_fresh_processes": (
        "1000",
        "random jobs in one process, with room for about two models: each image is that of a fork of a process that "
        "has only imported; 10 of them also of a process of their own",
    ),
    "tests/stateful/test_combinations.py::test_a_thousand_jobs_with_the_least_memory_are_too": (
        "1000",
        "the same, other jobs, with the least memory with which each of them can be done at all",
    ),
}


def sequences(given: dict[str, tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """What long tests found: (how many sequences, of what, seconds, result)."""
    rows = []
    for path, (count, what) in given.items():
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", path, "-m", "proof", "-q", "--no-header", "-p", "no:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        passed = done.returncode == 0 and "1 passed" in done.stdout
        if not passed:
            told = [line for line in done.stdout.splitlines() if "[warning" not in line]
            print("\n".join(told)[-6000:])
        rows.append((count, what, f"{time.perf_counter() - start:.0f}", "all held" if passed else "BROKEN"))
    return rows


def first_step() -> float:
    """Seconds from starting the command to the end of the first denoising step, the median of three."""
    program = (
        "import time, sys\n"
        "from safelight.cli import generate\n"
        "from safelight.engine.local import LocalEngine\n"
        "inner = LocalEngine.generate\n"
        "def told(self, request, on_progress=None):\n"
        "    def look(p):\n"
        "        if p.stage == 'denoise' and p.step == 1: print('FIRST', time.time(), file=sys.stderr)\n"
        "    return inner(self, request, look)\n"
        "LocalEngine.generate = told\n"
        "sys.argv = ['safelight', 'generate', 'octopus', '-m', 'starter-noto', '--steps', '2', '--out', sys.argv[1]]\n"
        "from safelight.cli.main import run\n"
        "run()\n"
    )
    times = []
    with tempfile.TemporaryDirectory() as out:
        for _ in range(3):
            start = time.time()
            done = subprocess.run([sys.executable, "-c", program, out], check=True, capture_output=True, text=True)
            times.append(float(done.stderr.split("FIRST ")[1].split()[0]) - start)
    return sorted(times)[1]


def equal_in_two_processes(*options: str) -> bool:
    """Whether A, B, A of one command are A, B, A again in a new process, and A is the same both times."""
    models = [part for name in ("noto", "twemoji", "noto") for part in ("-m", f"starter-{name}")]
    digests: list[list[str]] = []
    with tempfile.TemporaryDirectory() as out:
        # With a seed, as each command draws a random one without it.
        make = ["generate", "red apple", "--seed", "0", "--out", out, "--json", *models, *options]
        for _ in range(2):
            command = [sys.executable, "-m", "safelight.cli", *make]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            digests.append([json.loads(line)["pixels_sha256"] for line in done.stdout.splitlines()])
    a, b, again = digests[0]
    return a == again != b and digests[0] == digests[1]


def processes() -> list[tuple[str, str]]:
    """Start-up times in seconds, medians of five, and three images by two processes."""
    rows = []
    with tempfile.TemporaryDirectory() as out:
        make = ["generate", "red apple", "--out", out, "--json"]
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
        rows.append(("from the command to the end of the first denoising step of a starter", f"{first_step():.2f} s"))
        rows.append(
            ("A, B, A in one process, and again in a new one", "equal" if equal_in_two_processes() else "NOT EQUAL")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/proof.md"))
    parser.add_argument("--lane", choices=LANES)
    parser.add_argument("--switches", type=int, help="of the lane, instead of its own number")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; repeat for several")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["SAFELIGHT_ROOT"] = root
        if arguments.lane:
            print(json.dumps(lane(arguments.lane, arguments.switches or LANES[arguments.lane][0])))
            return
        KEPT.mkdir(parents=True, exist_ok=True)
        for name in arguments.section or SECTIONS:
            lines, sound = SECTIONS[name]()
            kept = {"when": time.strftime("%Y-%m-%d"), "lines": lines, "sound": sound}
            (KEPT / f"{name}.json").write_text(json.dumps(kept))
            print("\n".join(lines), flush=True)
    done = {
        name: json.loads((KEPT / f"{name}.json").read_text()) for name in SECTIONS if (KEPT / f"{name}.json").exists()
    }
    lines = heading()
    for section in done.values():
        lines += [*section["lines"], "", f"*{section['when']}*", ""]
    lines += [f"Not run: {name}." for name in SECTIONS if name not in done]
    arguments.file.write_text("\n".join(lines).rstrip() + "\n")
    raise SystemExit(0 if all(section["sound"] for section in done.values()) else 1)


def processor() -> str:
    from safelight.devices import machine

    return machine.processor()


def heading() -> list[str]:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("safelight", "torch", "diffusers", "transformers"))
    return [
        "# Proof",
        "",
        f"Made by `make proof`: {platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores,",
        f"Python {platform.python_version()}, {libraries}. Device: CPU.",
        "",
    ]


def lanes() -> tuple[list[str], bool]:
    sound = True
    lines = [
        "Switches between the three starters, two steps an image. *Differ*: images that are not those of the first of",
        "their model. *Thrown*: images that ended in the exception that was thrown into them. *MB*: resident memory;",
        f"{GROWTH_MB} MB more at the end would count as failure, but for kept pipelines, which are Python objects.",
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
    return lines, sound


def memory() -> tuple[list[str], bool]:
    rows = neighbour()
    lines = ["| a second process takes 4 GB in the middle of a generation | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    return lines, not any(value in ("NO", "NOT EQUAL") for _, value in rows)


def states() -> tuple[list[str], bool]:
    lines = [
        "Sequences on the simulated accelerator, after each step of which the ledger equals the device's own count,",
        "and every result is right or a clear error:",
        "",
        "| sequences | of | s | |",
        "|---|---|---|---|",
    ]
    return _with_rows(lines, SEQUENCES)


def server() -> tuple[list[str], bool]:
    return _with_rows(["| times | what | s | |", "|---|---|---|---|"], SERVER)


def trust() -> tuple[list[str], bool]:
    return _with_rows(["| | what | s | |", "|---|---|---|---|"], TRUST)


def combinations() -> tuple[list[str], bool]:
    lines = [
        "Random jobs over checkpoints (SD 1, SDXL), LoRAs, ControlNets, textual inversions, VAEs, text encoders,",
        "pictures, masks, outpainting, second passes, variations, seamless and tiled images, prompts and samplers,",
        "drawn anew each time:",
        "",
        "| jobs | what | s | |",
        "|---|---|---|---|",
    ]
    return _with_rows(lines, COMBINATIONS)


def _with_rows(lines: list[str], given: dict[str, tuple[str, str]]) -> tuple[list[str], bool]:
    rows = sequences(given)
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)], all(row[-1] == "all held" for row in rows)


def whole() -> tuple[list[str], bool]:
    rows = processes()
    lines = ["| whole processes | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    return lines, not any(value == "NOT EQUAL" for _, value in rows)


SECTIONS = {
    "lanes": lanes,
    "memory": memory,
    "server": server,
    "states": states,
    "combinations": combinations,
    "trust": trust,
    "processes": whole,
}
"""Each gives its part of the page, and whether all is as it must be."""


if __name__ == "__main__":
    main()
