"""What goes on beside an image: the next model is read from a slow disk, and a server is flooded with long calls.

``python benchmarks/beside.py``: the median seconds of a step alone, and while another checkpoint is prefetched from a
source of 200 MB/s (starters; with ``--full`` checkpoints of SD 1.5's size, see ``benchmarks/checkpoints.py``). Then
120 calls at once, 40 each of ``load``, ``verify`` and ``check``, while another client asks for the page and
``/api/v1/health`` every 20 ms; then the server is stopped while they run.

Predicted before the first run: a step beside a prefetch takes 1.05 times its time alone, as reading takes a twentieth
of a core; the page answers within 50 ms (p99), and the server stops within two seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from safelight.devices import transfer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support.serving import Server, ended, serving  # noqa: E402

RATE = 200e6
"""Bytes a second of the slow disk."""

CALLS = 40
"""Of each kind."""


class SlowDisk:
    """Slows all reads together to :data:`RATE` while the context lasts."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def __enter__(self) -> None:
        from safelight.devices import transfer

        self._fill = transfer._fill
        transfer._fill = self._slowly

    def __exit__(self, *error: object) -> None:
        from safelight.devices import transfer

        transfer._fill = self._fill

    def _slowly(self, read: transfer.Read, descriptor: int, view: memoryview, offset: int) -> None:
        with self._turn:
            time.sleep(view.nbytes / RATE)
        self._fill(read, descriptor, view, offset)


def steps(root: Path, names: tuple[str, str], size: int, count: int, times: int) -> None:
    """A step's median alone and beside a prefetch, by turns, so that both see the same machine."""
    import safelight

    engine = safelight.open_engine(root, attention_type="torch-sdp")
    folder = HERE.parent / "build/bench"
    for name in names:
        if (folder / f"{name}.safetensors").exists():
            engine.library.add(folder / f"{name}.safetensors", name)

    def draw(during: Callable[[], object]) -> list[float]:
        """Seconds of each step of an image that began and ended while ``during`` ran in a thread."""
        ends: list[tuple[float, bool]] = []
        thread = threading.Thread(target=during)

        def look(progress: safelight.Progress) -> None:
            if progress.stage == "denoise":
                if progress.step == 2:
                    thread.start()
                ends.append((time.perf_counter(), thread.is_alive()))

        asked = safelight.Request("x", names[0], seed=0, steps=count, width=size, height=size)
        next(engine.generate(asked, look))
        thread.join()
        return [after - before for (before, alive), (after, _) in itertools.pairwise(ends) if alive]

    def prefetch(taken: list[float]) -> None:
        engine.loaded.unload(engine.library.get(names[1]).digest)
        with SlowDisk():
            start = time.perf_counter()
            engine.loaded.prefetch(names[1])
            taken.append(time.perf_counter() - start)

    alone: list[float] = []
    beside: list[float] = []
    idle: list[float] = []
    busy: list[float] = []
    draw(lambda: None)
    for _ in range(times):
        prefetch(idle)
        beside += draw(lambda: prefetch(busy))
        alone += draw(lambda: time.sleep(busy[-1]))
    engine.close()
    one, other = statistics.median(alone) * 1e3, statistics.median(beside) * 1e3
    what = f"a step of {size}x{size}, {len(beside)} beside a prefetch from {RATE / 1e6:.0f} MB/s"
    print(f"| {what}: ms alone, beside, ratio | {one:.1f}, {other:.1f}, {other / one:.2f} |")
    print(
        f"| that prefetch: s alone, beside | {statistics.median(idle):.2f}, {statistics.median(busy):.2f} |", flush=True
    )


def flood(server: Server, calls: int) -> None:
    """Long calls at once; what the page and the health check take meanwhile."""
    with server.client() as client:
        job = client.post("/api/v1/generate", json={"prompt": "x", "model": "starter-noto", "steps": 2}).json()["id"]
        ended(client, job, 300)
        image = client.get(f"/api/v1/jobs/{job}/images").json()[0]["id"]
    paths = [
        path
        for _ in range(calls)
        for path in (
            "/api/v1/models/starter-noto/load",
            "/api/v1/models/starter-noto/verify",
            f"/api/v1/images/{image}/check",
        )
    ]
    waits: dict[str, list[float]] = {"/": [], "/api/v1/health": []}
    over = threading.Event()

    def look() -> None:
        with server.client() as client:
            while not over.wait(0.02):
                for path, taken in waits.items():
                    start = time.perf_counter()
                    client.get(path).raise_for_status()
                    taken.append(time.perf_counter() - start)

    def call(path: str) -> None:
        # The stop of the server cuts them off.
        with server.client() as client, contextlib.suppress(httpx.TransportError):
            client.post(path, timeout=600)

    watcher = threading.Thread(target=look)
    with ThreadPoolExecutor(len(paths)) as pool:
        for path in paths:
            pool.submit(call, path)
        watcher.start()
        time.sleep(min(20.0, calls * 0.5))
        over.set()
        watcher.join()
        start = time.perf_counter()
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(120)
        stopped = time.perf_counter() - start
    for path, taken in waits.items():
        taken.sort()
        p50, p99 = statistics.median(taken) * 1e3, taken[int(len(taken) * 0.99)] * 1e3
        print(f"| {path} beside {len(paths)} long calls: answers, ms p50, p99 | {len(taken)}, {p50:.1f}, {p99:.1f} |")
    print(f"| from SIGTERM to the end of the server, s | {stopped:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="steps of checkpoints of SD 1.5's size")
    parser.add_argument("--times", type=int, default=10, help="prefetches of which the median is taken")
    parser.add_argument("--calls", type=int, default=CALLS, help="of each kind")
    asked = parser.parse_args()
    print("| what | |\n|---|---|")
    with tempfile.TemporaryDirectory() as root:
        if asked.full:
            steps(Path(root), ("A", "B"), 256, 24, asked.times)
        else:
            steps(Path(root), ("starter-noto", "starter-twemoji"), 64, 30, asked.times)
    with tempfile.TemporaryDirectory() as root, serving(Path(root), spare=False) as server:
        server.ready()
        flood(server, asked.calls)


if __name__ == "__main__":
    main()
