"""A cluster of several nodes on this machine: nodes that are killed, frozen, damaged or full lose nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import serving
from support.changed_starter import write_changed_starter
from support.ray_cluster import Machines
from support.serving import ASK, ended

LEASE = 6.0

Json = dict[str, Any]


@pytest.fixture
def machines(tmp_path: Path) -> Generator[Machines]:
    (tmp_path / "nodes").mkdir()
    made = Machines(tmp_path / "nodes")
    yield made
    made.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The server's, with a model of its own, which no node has."""
    made = tmp_path / "server"
    made.mkdir()
    (made / "safelight.yaml").write_text(f"cluster_lease_seconds: {LEASE}\ncluster_shared_files: false\n")
    return made


def start(machines: Machines, root: Path) -> serving.Server:
    return serving.start(root, "--cluster", machines.address, real=True)


def slots(http: httpx.Client) -> list[Json]:
    return http.get("/api/v1/slots").json()


def wait_for(http: httpx.Client, count: int, seconds: float = 200.0) -> None:
    """Wait until so many slots take jobs."""
    until = time.monotonic() + seconds
    while sum(not one["problem"] for one in slots(http)) < count:
        assert time.monotonic() < until, slots(http)
        time.sleep(0.3)


def queue(http: httpx.Client, **more: Any) -> str:
    answer = http.post("/api/v1/generate", json={**ASK, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def images(http: httpx.Client, jobs: list[str]) -> list[Json]:
    """The one image of each job, which is done."""
    found: list[Json] = []
    for job in jobs:
        done = ended(http, job, 120)
        assert done["state"] == "done", (done["reason"], done["failure"], done["attempts"])
        [image] = http.get(f"/api/v1/jobs/{job}/images").json()
        found.append(image)
    return found


@pytest.mark.full
def test_a_node_makes_the_pixels_of_this_machine(machines: Machines, root: Path) -> None:
    with serving.serving(root) as alone, alone.client() as http:
        [right] = images(http, [queue(http)])
    machines.add("a")
    server = start(machines, root)
    try:
        with server.client() as http:
            wait_for(http, 1)
            [made, isolated] = images(http, [queue(http), queue(http, isolate=True)])
            assert made["pixels_sha256"] == right["pixels_sha256"] == isolated["pixels_sha256"]
            assert made["metadata"]["made"]["slot"] == "cluster:0"
            assert made["metadata"]["made"]["machine"].endswith(":0")
            job = queue(http, steps=150)
            while not http.get("/api/v1/queue").json()["running"]:
                time.sleep(0.02)
            assert http.post(f"/api/v1/jobs/{job}/cancel").json()["cancelled"]
            assert ended(http, job)["state"] == "cancelled"
    finally:
        serving.stop(server)


@pytest.mark.full
def test_two_nodes_make_the_same_pixels_and_one_that_is_killed_loses_nothing(machines: Machines, root: Path) -> None:
    machines.add("a")
    server = start(machines, root)
    try:
        with server.client() as http:
            wait_for(http, 1)
            # A node that joins later is used, too.
            machines.add("b")
            wait_for(http, 2)
            jobs = [
                queue(http, seed=seed % 2, steps=12, model=("starter-noto", "starter-fluent")[seed % 2])
                for seed in range(8)
            ]
            made = images(http, jobs)
            assert {one["metadata"]["made"]["slot"] for one in made} == {"cluster:0", "cluster:1"}
            assert len({one["pixels_sha256"] for one in made}) == 2
            assert all(one["metadata"]["made"]["machine"] for one in made)
            jobs = [queue(http, seed=1, steps=60, model="starter-fluent") for _ in range(6)]
            while len(http.get("/api/v1/queue").json()["running"]) < 2:
                time.sleep(0.02)
            machines.signal("b", signal.SIGKILL)
            made = images(http, jobs)
            assert len({one["pixels_sha256"] for one in made}) == 1
            assert sum(ended(http, job)["attempts"] for job in jobs) == len(jobs) + 1
            assert sum(bool(one["problem"]) for one in slots(http)) == 1
            # It comes back as another node, and Ray places the slot there.
            machines.add("b2")
            wait_for(http, 2)
    finally:
        serving.stop(server)


@pytest.mark.full
def test_a_node_that_is_frozen_and_wakes_after_its_lease_finishes_nothing_twice(machines: Machines, root: Path) -> None:
    machines.add("a")
    machines.add("b")
    server = start(machines, root)
    try:
        with server.client() as http:
            wait_for(http, 2)
            [right] = images(http, [queue(http, steps=80, seed=5)])
            jobs = [queue(http, steps=80, seed=5) for _ in range(4)]
            while len(http.get("/api/v1/queue").json()["running"]) < 2:
                time.sleep(0.02)
            machines.signal("b", signal.SIGSTOP)
            made = images(http, jobs)
            assert {one["pixels_sha256"] for one in made} == {right["pixels_sha256"]}
            machines.signal("b", signal.SIGCONT)
            time.sleep(LEASE)
            assert http.get("/api/v1/images/count").json()["count"] == 5
            assert [http.get(f"/api/v1/jobs/{job}").json()["images"] for job in jobs] == [1] * 4
            more = images(http, [queue(http, seed=seed) for seed in range(6)])
            assert len(more) == 6
    finally:
        serving.stop(server)


@pytest.mark.full
def test_a_server_that_is_killed_goes_on_with_the_same_nodes(machines: Machines, root: Path) -> None:
    machines.add("a")
    server = start(machines, root)
    with server.client() as http:
        wait_for(http, 1)
        jobs = [queue(http, steps=60, seed=5) for _ in range(4)]
        while not http.get("/api/v1/queue").json()["running"]:
            time.sleep(0.02)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    again = start(machines, root)
    try:
        with again.client() as http:
            made = images(http, jobs)
            assert len({one["pixels_sha256"] for one in made}) == 1
            assert http.get("/api/v1/images/count").json()["count"] == 4
    finally:
        serving.stop(again)


@pytest.mark.full
def test_a_damaged_copy_and_a_full_disk_change_no_image(machines: Machines, root: Path) -> None:
    """The model is on no node; each fetches a copy of its own, in ranges."""
    machines.add("a")
    machines.add("full", SAFELIGHT_CLUSTER_CACHE_GB="0.001")
    with serving.serving(root, real=True) as alone, alone.client() as http:
        path = root / "own.safetensors"
        write_changed_starter(path)
        command = [
            sys.executable,
            "-m",
            "safelight.cli",
            "models",
            "add",
            str(path),
            "--name",
            "own",
            "--root",
            str(root),
        ]
        subprocess.run(command, check=True, capture_output=True)
        [right] = images(http, [queue(http, model="own")])
    server = start(machines, root)
    try:
        with server.client() as http:
            wait_for(http, 2)
            made = images(http, [queue(http, model="own") for _ in range(4)])
            assert {one["pixels_sha256"] for one in made} == {right["pixels_sha256"]}
            # Only one of the nodes has room for it.
            assert len({one["metadata"]["made"]["slot"] for one in made}) == 1
            [copy] = machines.root("a").glob("cache/*/*.safetensors")
            assert copy.stat().st_size == path.stat().st_size
            assert not list(machines.root("full").glob("cache/*/*.safetensors"))
            # Its copy is damaged: the job fails there, gets the file again, and its pixels are right.
            data = bytearray(copy.read_bytes())
            data[-1000:] = bytes(1000)
            copy.write_bytes(data)
            http.post("/api/v1/models/own/unload")
            made = images(http, [queue(http, model="own", seed=3)])
            assert {one["pixels_sha256"] for one in made} == {right["pixels_sha256"]}
            [copy] = machines.root("a").glob("cache/*/*.safetensors")
            assert copy.read_bytes() == path.read_bytes()
    finally:
        serving.stop(server)


@pytest.mark.full
def test_a_node_with_other_versions_is_refused(machines: Machines, root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/numpy-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    machines.add("a", PYTHONPATH=str(other.parent))
    server = start(machines, root)
    try:
        with server.client() as http:
            until = time.monotonic() + 60
            while "other versions" not in slots(http)[0]["problem"]:
                assert time.monotonic() < until, slots(http)
                time.sleep(0.3)
            assert "numpy 0.1 in place of" in slots(http)[0]["problem"]
            job = queue(http)
            time.sleep(2)
            assert http.get(f"/api/v1/jobs/{job}").json()["state"] == "queued"
    finally:
        serving.stop(server)


def test_an_address_without_a_cluster_is_refused(root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "safelight.cli",
        "serve",
        "--root",
        str(root),
        "--port",
        "0",
        "--cluster",
        "127.0.0.1:1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no Ray cluster answers there" in done.stderr
