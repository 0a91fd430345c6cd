"""Examine Safelight on this machine's GPU: ``make gpu``, or ``python tools/gpu.py --device cuda``.

Prints a line for each finding, and writes all of them to ``out/gpu/DEVICE.json`` and ``out/gpu/DEVICE.md``.
``docs/gpu.md`` explains each section. The exit code is 1 if a finding is wrong or a section is missing.

Each section (``gpu_sections.py``, ``gpu_families.py``, ``gpu_forms.py``) has a process of its own, so that what it
does to the device and to torch ends with it. Nothing is downloaded, and the package need not be installed: a checkout
whose dependencies lie on ``PYTHONPATH`` is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_families import FAMILY_SECTIONS, large
from gpu_forms import forms, quantised
from gpu_machine import Finding, Machine
from gpu_sections import SECTIONS

ALWAYS = {**SECTIONS, **FAMILY_SECTIONS, "forms": forms}
ALL = {**ALWAYS, "large": large, "quantised": quantised}
"""With the sections that need so much time, memory and disk that they run only if they are named."""

HOME = Path(__file__).resolve().parents[1]
PATHS = [str(HOME / folder) for folder in ("src", "benchmarks", "tests")]

SECTION_SECONDS = 150.0
"""Limit for a section."""

ALL_SECONDS = 450.0
"""Limit for all sections."""

EVENT = "finding "
"""Begins a line that a section's process prints for its supervisor."""


def run_section(name: str, machine: Machine) -> None:
    """Run a section in this process. Prints a line for each finding, for the supervisor."""

    def say(finding: Finding) -> None:
        print(EVENT + json.dumps(asdict(finding) | {"section": name}), flush=True)

    try:
        for finding in ALL[name](machine):
            say(finding)
    except Exception as error:  # noqa: BLE001 - whatever a section raises is what it found
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        say(Finding("the section", False, f"{type(error).__name__}: {error} ({place})"))


def supervise(command: Sequence[str], names: Sequence[str]) -> Iterator[Finding]:
    """Run each section in a process of its own.

    A section that ends its process, takes too long, or has no time left is a finding that is wrong.
    """
    until = time.monotonic() + ALL_SECONDS
    for name in names:
        seconds = min(SECTION_SECONDS, until - time.monotonic())
        if seconds <= 0:
            yield Finding("the section", False, f"left out: {ALL_SECONDS:.0f} s had passed", section=name)
            continue
        # With a session of its own, everything that the section starts can be ended with it.
        process = subprocess.Popen(
            [*command, "--run", name], stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        try:
            ended = yield from findings(process, name, time.monotonic() + seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if not ended:
            yield Finding("the section", False, f"stopped after {seconds:.0f} s", section=name)
        elif code not in (0, -signal.SIGKILL):
            yield Finding("the section", False, f"its process ended with {code}", section=name)


def findings(process: subprocess.Popen[str], name: str, until: float) -> Generator[Finding, None, bool]:
    """Yield the findings that a process prints. Returns whether it ended in time."""
    lines: queue.Queue[str | None] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        try:
            for line in output:
                lines.put(line)
        finally:
            lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return False
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return True
        if line.startswith(EVENT):
            yield Finding(**json.loads(line.removeprefix(EVENT)))
        else:
            print(f"{name}: {line}", end="", file=sys.stderr)


def page(device: str, command: str, found: Sequence[Finding], seconds: float) -> str:
    """Return the report as Markdown."""
    hardware = next((one.evidence for one in found if one.what == "hardware"), device)
    lines = [f"### {hardware}", "", f"`{command}`, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s.", ""]
    lines += ["| section | what | | found |", "|---|---|---|---|"]
    for one in found:
        mark = {True: "right", False: "**wrong**", None: ""}[one.ok]
        cells = (one.section, one.what, mark, one.words())
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or simulated; default: the machine's GPU")
    parser.add_argument("--folder", type=Path, default=HOME / "build/gpu", help="for models (8.5 GB) and data")
    parser.add_argument("--out", type=Path, default=HOME / "out/gpu", help="for the reports")
    parser.add_argument("--small", action="store_true", help="tiny models and few repetitions, as for simulated")
    parser.add_argument("--section", action="append", choices=ALL, help="only this section; may be repeated")
    parser.add_argument("--run", choices=ALL, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    # For this process, and for all that sections start.
    sys.path[:0] = PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

    from safelight.devices import choice
    from safelight.errors import SafelightError

    try:
        device = choice.device(asked.device)
    except SafelightError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    small = asked.small or device.name == "simulated"
    if asked.run:
        run_section(asked.run, Machine(device, folder, small))
        return
    # What an earlier run has measured must not be taken for what is measured now.
    shutil.rmtree(folder / "root", ignore_errors=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device.name, "--folder", str(folder)]
    command += ["--small"] if small else []
    start, found = time.monotonic(), list[Finding]()
    for finding in supervise(command, asked.section or list(ALWAYS)):
        found.append(finding)
        print(finding.line(), flush=True)
        seconds = time.monotonic() - start
        report = {"device": device.name, "seconds": seconds, "findings": [asdict(one) for one in found]}
        (asked.out / f"{device.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        words = page(device.name, " ".join(["python tools/gpu.py", *sys.argv[1:]]), found, seconds)
        (asked.out / f"{device.name}.md").write_text(words)
    wrong = sum(one.ok is False for one in found)
    print(f"{time.monotonic() - start:.0f} s, {wrong} findings are wrong: {asked.out / device.name}.md")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
