"""Workers and servers that are killed under load: every accepted job ends once, with the right pixels or a reason."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from support import serving
from support.scale import times
from support.serving import Server

import safelight

MODELS = ("starter-noto", "starter-fluent", "starter-twemoji")


@pytest.fixture(scope="module")
def right() -> dict[tuple[str, int], str]:
    """By an engine that knows no server."""
    engine = safelight.open_engine()
    made = {}
    for model in MODELS:
        request = safelight.Request("red apple", model, steps=4, count=4)
        made |= {(model, image.seed): image.pixels_sha256 for image in engine.generate(request)}
    return made


def ask(client: httpx.Client, chance: random.Random, most: int = times(1, 4)) -> str:
    """A job of up to ``most`` images."""
    seed = chance.randrange(3)
    count = min(4 - seed, most)
    body = {"prompt": "red apple", "model": chance.choice(MODELS), "seed": seed, "steps": 4, "count": count}
    answer = client.post("/api/v1/generate", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def all_ended(server: Server, accepted: list[str], right: dict[tuple[str, int], str]) -> dict[str, int]:
    """Wait for all; how many ended in which state. Nothing is half there."""
    states: dict[str, int] = {}
    with server.client() as client:
        for job_id in accepted:
            job = serving.ended(client, job_id, 300)
            states[job["state"]] = states.get(job["state"], 0) + 1
            images = client.get(f"/api/v1/jobs/{job_id}/images").json()
            for image in images:
                assert image["pixels_sha256"] == right[job["model"], image["seed"]]
                assert client.get(image["url"]).content[:4] == b"\x89PNG"
            if job["state"] == "done":
                assert [image["place"] for image in images] == list(range(job["request"]["count"]))
            else:
                assert job["state"] == "failed"
                assert job["reason"]
    return states


def nothing_is_left_over(root: Path) -> None:
    with sqlite3.connect(root / "safelight.db") as connection:
        rows = {name for (name,) in connection.execute("SELECT file FROM images")}
        assert not list(connection.execute("SELECT 1 FROM images WHERE job NOT IN (SELECT id FROM jobs)"))
        ids = {name for (name,) in connection.execute("SELECT id FROM images")}
    files = {str(path.relative_to(root / "images")) for path in (root / "images").rglob("*") if path.is_file()}
    assert files == rows
    assert {path.stem for path in (root / "thumbnails").glob("*")} == ids


def kill_workers(root: Path, right: dict[tuple[str, int], str], kills: int) -> dict[str, int]:
    chance = random.Random(0)
    with serving.serving(root, spare=True) as server:
        server.ready()
        accepted: list[str] = []
        with server.client() as client:
            for _ in range(kills):
                accepted += [ask(client, chance) for _ in range(2)]
                time.sleep(chance.random() * 1.5)
                before = client.get("/api/v1/health").json()["restarts"]
                os.kill(server.worker(), signal.SIGKILL)
                while client.get("/api/v1/health").json()["restarts"] == before:
                    time.sleep(0.02)
        states = all_ended(server, accepted, right)
        assert sum(states.values()) == 2 * kills
        assert serving.stop(server) == 0
    nothing_is_left_over(root)
    return states


def kill_servers(root: Path, right: dict[tuple[str, int], str], kills: int) -> dict[str, int]:
    chance = random.Random(1)
    accepted: list[str] = []
    for _ in range(kills):
        server = serving.start(root)
        workers: list[int] = []
        with server.client() as client:
            server.ready()
            accepted += [ask(client, chance) for _ in range(3)]
            time.sleep(chance.random())
            workers = serving.children(server.process.pid)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
        for worker in workers:
            until = time.monotonic() + 20
            while psutil.pid_exists(worker) and time.monotonic() < until:
                time.sleep(0.02)
            assert not psutil.pid_exists(worker), "a worker outlived its server"
    with serving.serving(root) as server:
        states = all_ended(server, accepted, right)
    nothing_is_left_over(root)
    return states


@pytest.mark.full
def test_workers_are_killed_under_load(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    assert kill_workers(tmp_path, right, times(2, 5))["done"] > 0


@pytest.mark.full
def test_servers_are_killed_under_load(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    assert kill_servers(tmp_path, right, times(1, 2))["done"] > 0


@pytest.mark.proof
def test_workers_are_killed_200_times(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    assert kill_workers(tmp_path, right, 200)["done"] > 0


@pytest.mark.proof
def test_servers_are_killed_20_times(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    assert kill_servers(tmp_path, right, 20)["done"] > 0


def test_a_server_that_is_stopped_puts_its_job_back(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    """SIGTERM: nothing is lost, nothing counts as a try, and the next server goes on."""
    (tmp_path / "safelight.yaml").write_text("shutdown_seconds: 0.2\n")
    server = serving.start(tmp_path)
    server.ready()
    with server.client() as client:
        body = {"prompt": "red apple", "model": "starter-noto", "steps": 30, "count": 2}
        job = client.post("/api/v1/generate", json=body).json()["id"]
        while not any(one["progress"] for one in client.get("/api/v1/queue").json()["running"]):
            time.sleep(0.02)
    assert serving.stop(server) == 0
    with serving.serving(tmp_path) as again, again.client() as client:
        found = serving.ended(client, job)
        assert (found["state"], found["attempts"], found["images"]) == ("done", 1, 2)


@pytest.mark.full
def test_jobs_wait_while_there_is_no_worker(tmp_path: Path, right: dict[tuple[str, int], str]) -> None:
    """A job that is asked for at once after the start waits for the worker; many at once are all made."""
    with serving.serving(tmp_path, "--port", "0") as server:
        accepted: list[str] = []
        lock = threading.Lock()

        def client(number: int) -> None:
            with server.client() as http:
                job = ask(http, random.Random(number), times(1, 4))
            with lock:
                accepted.append(job)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all_ended(server, accepted, right) == {"done": 12}
