"""The server under 100 clients at once: nothing is lost, and it answers while its worker computes.

``python benchmarks/serving.py``: 2,000 requests of the smallest size (a starter, 8×8, 1 step) by 100 clients, each of
which looks once a second whether its jobs are done; meanwhile another asks ``/api/v1/health`` and ``/api/v1/queue``
every 20 ms. Then, on a quiet server: seconds from the first step to its preview at a client, and from the death of the
worker to the model in the next one, with a starter and, with ``--full``, a checkpoint of SD 1.5's size
(``benchmarks/checkpoints.py``).

``--slots 1 2 4 --cluster``: the crowd, on so many simulated slots, and on one slot by Ray; then as many jobs of one
client that hardly asks, so that the CPU is that of the jobs. Predicted before the first run: 6 ms of the server's CPU
for a job without its clients' questions, the same with more slots, and 3 ms more by Ray, which sends each message
through another process.

Predicted before the first run: about 30 requests a second (each writes two files and five rows); p50 10 ms, p99 100
ms, as the server's threads take turns; a preview within 0.1 s; a starter within 0.5 s of the death, SD 1.5's size
within 1 s.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support.serving import Server, ended, serving  # noqa: E402

CLIENTS, REQUESTS = 100, 2000

SMALLEST = {"prompt": "x", "model": "starter-noto", "steps": 1, "width": 8, "height": 8}
"""The smallest request."""


def crowd(server: Server, requests: int, label: str) -> None:
    """Let 100 clients queue requests, and print what it took."""
    over = threading.Event()
    waits: list[float] = []

    def look() -> None:
        with server.client() as client:
            while not over.wait(0.02):
                for path in ("/api/v1/health", "/api/v1/queue"):
                    start = time.perf_counter()
                    client.get(path).raise_for_status()
                    waits.append(time.perf_counter() - start)

    def one(number: int) -> str:
        with server.client() as client:
            made = []
            for turn in range(requests // CLIENTS):
                answer = client.post("/api/v1/generate", json={**SMALLEST, "seed": number * 100 + turn})
                assert answer.status_code == 202, answer.text
                made.append(answer.json()["id"])
            states = [ended(client, job, 900, every=1.0)["state"] for job in made]
        assert states == ["done"] * len(made), states
        return "done"

    watcher = threading.Thread(target=look)
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    watcher.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert set(pool.map(one, range(CLIENTS))) == {"done"}
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    after = process.cpu_times()
    with server.client() as client:
        images = client.get("/api/v1/images/count").json()["count"]
    waits.sort()
    spent = (after.user + after.system - before.user - before.system) * 1e3 / requests
    print(f"| {label}: {CLIENTS} clients, {requests} requests: all done, images | {images} |")
    print(f"| requests a second | {requests / seconds:.1f} |")
    print(f"| CPU of the server's process for each job and all that clients ask meanwhile, ms | {spent:.1f} |")
    print(f"| answers meanwhile, ms: p50 | {statistics.median(waits) * 1e3:.1f} |")
    print(f"| p99 | {waits[int(len(waits) * 0.99)] * 1e3:.1f} |", flush=True)


def alone(server: Server, jobs: int, label: str) -> None:
    """Print what the server's process spends on a job while one client only asks once a second whether all are done."""
    process = psutil.Process(server.process.pid)
    with server.client() as client:

        def count() -> int:
            return int(client.get("/api/v1/images/count").json()["count"])

        # The first jobs load the model.
        for _ in range(4):
            ended(client, client.post("/api/v1/generate", json=SMALLEST).json()["id"], 300)
        before, start = count(), process.cpu_times()
        for number in range(jobs):
            client.post("/api/v1/generate", json={**SMALLEST, "seed": number}).raise_for_status()
        queued = process.cpu_times()
        while count() < before + jobs:
            time.sleep(1.0)
    end = process.cpu_times()
    posted = (queued.user + queued.system - start.user - start.system) * 1e3 / jobs
    spent = (end.user + end.system - start.user - start.system) * 1e3 / jobs
    print(f"| {label}, one client, {jobs} jobs: CPU of the server's process for each job, ms | {spent:.1f} |")
    print(f"| of this until all are queued, ms | {posted:.1f} |", flush=True)


def first_step(server: Server, model: str, size: int, job: str) -> float:
    """The time at which a client hears of the job's first step."""
    with server.client() as client, client.stream("GET", "/api/v1/events", params={"job": job}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                data = json.loads(line[6:])
                # The event of the first step may be gone before this client listens.
                if data.get("stage") == "denoise" and data["step"] >= 1:
                    return time.perf_counter()
    raise AssertionError((model, size))


def work() -> float:
    """The CPU time of a little work, in seconds."""
    start = time.thread_time()
    json.loads(json.dumps([{"number": number, "text": str(number)} for number in range(300)]))
    return time.thread_time() - start


def after_a_pause() -> float:
    """How many times longer Python code takes after a tenth of a second in which this process did nothing.

    A processor that others use meanwhile has lost the code and the data from its caches.
    """
    at_once = statistics.median(work() for _ in range(50))
    late = []
    for _ in range(20):
        time.sleep(0.1)
        late.append(work())
    return statistics.median(late) / at_once


def replayed(jobs: int) -> None:
    """Print what the server's process spends on a job if its worker computes nothing, so that it never pauses."""
    print(f"| Python code after a pause of 0.1 s takes so many times longer | {after_a_pause():.1f} |", flush=True)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "safelight.yaml").write_text("device: cpu\n")
        with serving(Path(root), program=(str(HERE / "replaying.py"),), real=True) as server:
            server.ready()
            alone(server, jobs, "a worker that only repeats")


def death(server: Server, model: str, size: int) -> None:
    """From the death of a worker that has the model to the end of binding in the next, and to its first step."""
    ask = {"prompt": "x", "model": model, "steps": 2, "width": size, "height": size}
    took, switched = [], []
    with server.client() as client:
        for _ in range(5):
            job = client.post("/api/v1/generate", json=ask).json()
            ended(client, job["id"], 600)
            while not client.get("/api/v1/health").json()["spare"]:
                time.sleep(0.05)
            time.sleep(1.0)
            os.kill(server.worker(), signal.SIGKILL)
            start = time.perf_counter()
            while True:
                answer = client.post("/api/v1/models/" + model + "/load")
                if answer.status_code == 200:
                    break
                time.sleep(0.005)
            switched.append(time.perf_counter() - start)
            job = client.post("/api/v1/generate", json=ask).json()
            took.append(first_step(server, model, size, job["id"]) - start)
    print(f"| {model}: from the worker's death to the model in the next one, s | {statistics.median(switched):.2f} |")
    print(f"| and to its first step | {statistics.median(took):.2f} |", flush=True)


def preview(server: Server) -> None:
    """From the first step to its preview at a client that asks every 20 ms as AUTOMATIC1111's do."""
    waits = []
    with server.client() as client:
        for _ in range(5):
            ask = {"prompt": "x", "model": "starter-noto", "steps": 150}
            job = client.post("/api/v1/generate", json=ask).json()["id"]
            at = first_step(server, "starter-noto", 64, job)
            while client.get("/sdapi/v1/progress").json()["current_image"] is None:
                time.sleep(0.02)
            waits.append(time.perf_counter() - at)
            client.post(f"/api/v1/jobs/{job}/cancel")
            ended(client, job)
    print(f"| from the first step to its preview, s | {statistics.median(waits):.3f} |", flush=True)


def slots(counts: list[int], cluster: bool, requests: int, with_crowd: bool) -> None:
    """The crowd and one client, on several simulated slots, and on a slot of a Ray cluster on this machine."""
    for count in counts:
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "safelight.yaml").write_text(f"devices: [simulated:{count}]\nthreads: 2\n")
            with serving(Path(root)) as server:
                until_ready(server, count)
                if with_crowd:
                    crowd(server, requests, f"{count} simulated slots")
                alone(server, requests, f"{count} simulated slots")
    if cluster:
        from support.ray_cluster import Machines

        with tempfile.TemporaryDirectory() as folder:
            machines = Machines(Path(folder))
            machines.add("a", SAFELIGHT_DEVICE="simulated")
            try:
                with serving(Path(folder) / "server", "--cluster", machines.address, real=True) as server:
                    until_ready(server, 1)
                    if with_crowd:
                        crowd(server, requests, "one slot by Ray")
                    alone(server, requests, "one slot by Ray")
            finally:
                machines.close()


def until_ready(server: Server, count: int) -> None:
    """Wait until all slots take jobs."""
    with server.client() as client:
        while True:
            found = client.get("/api/v1/slots").json()
            if len(found) == count and all(one["worker"] == "ready" and not one["problem"] for one in found):
                return
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also a checkpoint of SD 1.5's size")
    parser.add_argument("--no-crowd", action="store_true", help="leave the 100 clients out")
    parser.add_argument("--slots", type=int, nargs="*", default=[], help="the crowd alone, on so many simulated slots")
    parser.add_argument("--cluster", action="store_true", help="the crowd alone, on one slot by Ray")
    parser.add_argument("--replayed", action="store_true", help="one client, and a worker that computes nothing")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    arguments = parser.parse_args()
    print("| what | |\n|---|---|")
    if arguments.replayed:
        replayed(arguments.requests)
        return
    if arguments.slots or arguments.cluster:
        slots(arguments.slots, arguments.cluster, arguments.requests, not arguments.no_crowd)
        return
    with tempfile.TemporaryDirectory() as root, serving(Path(root), spare=True) as server:
        server.ready()
        if not arguments.no_crowd:
            crowd(server, arguments.requests, "one slot")
        preview(server)
        death(server, "starter-noto", 64)
    if arguments.full:
        folder = HERE.parent / "build/bench"
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "safelight.yaml").write_text(f"model_folders: [{folder}]\nprecision: bf16\n")
            with serving(Path(root), spare=True) as server, server.client() as client:
                server.ready()
                added = {"path": str(folder / "A.safetensors"), "name": "full"}
                client.post("/api/v1/models", json=added).raise_for_status()
                death(server, "full", 256)


if __name__ == "__main__":
    main()
