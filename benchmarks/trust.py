"""What trust costs: time inside gates, and images in processes of their own against warm ones.

``python benchmarks/trust.py [--full]`` makes 50 images each way, by turns, with a starter; with ``--full`` also 10 with
a random checkpoint of SD 1.5's size (``benchmarks/checkpoints.py``). Memory is the proportional set size of all
processes of a way: pages that several share count once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil

import safelight
from safelight.assembly.programs import ZYGOTE
from safelight.catalog.catalog import Catalog
from safelight.request.results import Progress
from safelight.request.schema import Request
from safelight.settings_sources import load_settings
from safelight.workers.isolation import ForkingRunner, IsolatedEngine

FOLDER = Path(__file__).parents[1] / "build/bench"


def pss(pids: set[int]) -> float:
    """Megabytes."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def family(pid: int) -> set[int]:
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}


def compared(root: Path, request: Request, count: int) -> list[tuple[str, str]]:
    warm = safelight.open_engine(root)
    settings = load_settings(root)
    isolated_runner = ForkingRunner(ZYGOTE, settings)
    alone = IsolatedEngine(Catalog.under(settings.root), isolated_runner)
    peak = {"warm": 0.0, "alone": 0.0}
    seconds: dict[str, list[float]] = {"warm": [], "alone": []}
    differ = 0
    gates = whole = 0.0

    def watching(way: str):
        def on_progress(progress: Progress) -> None:
            if progress.stage == "decode":
                pids = {psutil.Process().pid} if way == "warm" else family(isolated_runner._zygote.pid)  # type: ignore[union-attr]
                peak[way] = max(peak[way], pss(pids))

        return on_progress

    next(warm.generate(request))
    next(alone.generate(request))
    for turn in range(count):
        asked = safelight.Request(
            request.prompt,
            request.model,
            seed=turn,
            steps=request.steps,
            width=request.width,
            height=request.height,
            precision=request.precision,
        )
        digests = []
        for way, engine in (("warm", warm), ("alone", alone)):
            start = time.perf_counter()
            image = next(engine.generate(asked, watching(way) if turn == count - 1 else (lambda _: None)))
            seconds[way].append(time.perf_counter() - start)
            digests.append(image.pixels_sha256)
            if way == "warm":
                gates, whole = gates + image.seconds.gates, whole + image.seconds.total
        differ += digests[0] != digests[1]
    alone.close()
    warm.close()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return [
        ("images each way", str(count)),
        ("that differ", str(differ)),
        ("median s, warm", f"{medians['warm']:.3f}"),
        ("median s, in a process of its own", f"{medians['alone']:.3f}"),
        ("more s", f"{medians['alone'] - medians['warm']:.3f}"),
        ("MB, the warm process", f"{peak['warm']:.0f}"),
        ("MB, zygote, keeper and child together", f"{peak['alone']:.0f}"),
        ("time inside gates, of the warm images' time", f"{gates / whole:.2%}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--images", type=int, default=50, help="each way, with the starter")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print("| what | | |\n|---|---|---|")
        for label, value in compared(root, Request("red apple", "starter-noto", steps=20), arguments.images):
            print(f"| starter | {label} | {value} |", flush=True)
        if arguments.full:
            safelight.open_engine(root).library.add(FOLDER / "A.safetensors", "A")
            request = Request("red apple", "A", steps=4, width=256, height=256, precision="bf16")
            for label, value in compared(root, request, 10):
                print(f"| SD 1.5 size, bf16 | {label} | {value} |", flush=True)


if __name__ == "__main__":
    main()
