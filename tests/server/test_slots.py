"""A server with several slots: two on the CPU, and simulated accelerators."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from support import serving
from support.people import add_people, as_person, key_of
from support.serving import ASK, ended

from safelight.assembly.slots import plan_slots
from safelight.errors import SettingError
from safelight.queue.person import Person
from safelight.request.results import Progress
from safelight.request.schema import Request
from safelight.server import intake
from safelight.settings import Settings
from safelight.workers.client import ServerEngine

MODELS = ("starter-noto", "starter-fluent", "starter-twemoji")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Generator[serving.Server]:
    root = tmp_path_factory.mktemp("slots")
    (root / "safelight.yaml").write_text("devices: [cpu:2]\nthreads: 2\n")
    with serving.serving(root) as server:
        wait_until_ready(server, 2)
        yield server


def wait_until_ready(server: serving.Server, count: int) -> None:
    until = time.monotonic() + 120
    with server.client() as http:
        while [one["worker"] for one in http.get("/api/v1/slots").json()] != ["ready"] * count:
            assert time.monotonic() < until
            time.sleep(0.1)


def hashes(http: httpx.Client, jobs: list[str]) -> list[tuple[str, str, str]]:
    """The slot, the model and the hash of the pixels of each job's image."""
    found: list[tuple[str, str, str]] = []
    for job in jobs:
        done = ended(http, job)
        assert done["state"] == "done", done
        [image] = http.get(f"/api/v1/jobs/{job}/images").json()
        assert image["metadata"]["made"]["slot"] == done["slot"]
        found.append((done["slot"], image["model"], image["pixels_sha256"]))
    return found


def queue(http: httpx.Client, **more: Any) -> str:
    answer = http.post("/api/v1/generate", json={**ASK, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def test_jobs_are_spread_and_pixels_do_not_depend_on_the_slot(two: serving.Server) -> None:
    with two.client() as http:
        jobs = [queue(http, model=MODELS[number % 3], steps=6) for number in range(12)]
        found = hashes(http, jobs)
        assert {slot for slot, _, _ in found} == {"cpu:0", "cpu:1"}
        assert len({(model, pixels) for _, model, pixels in found}) == 3
        # With two slots, a model stays where it is: fewer switches than jobs.
        slots = http.get("/api/v1/slots").json()
        assert sum(one["switches"] for one in slots) < 9
        assert all(one["run"]["threads"] == 1 for one in slots)


def test_the_images_of_one_request_are_made_on_both_slots_and_are_those_of_one(two: serving.Server) -> None:
    body = {**ASK, "seed": 7, "steps": 10, "count": 5, "model": MODELS[0], "width": 64, "height": 64}

    def made(http: httpx.Client, **more: Any) -> list[dict[str, Any]]:
        jobs = http.post("/api/v1/generate", json={**body, **more}).json()["jobs"]
        assert [ended(http, job)["state"] for job in jobs] == ["done"] * (2 if more else 1)
        return [image for job in jobs for image in http.get(f"/api/v1/jobs/{job}/images").json()]

    with two.client() as http:
        # Both hold the model then, so neither leaves a part to the other.
        for slot in ("cpu:0", "cpu:1"):
            http.post(f"/api/v1/slots/{slot}/drain").raise_for_status()
            hashes(http, [queue(http, model=MODELS[0])])
            http.post(f"/api/v1/slots/{slot}/resume").raise_for_status()
        whole, parts = made(http), made(http, spread=True)
    assert [image["seed"] for image in parts] == [7, 8, 9, 10, 11]
    slots = [image["metadata"]["made"]["slot"] for image in parts]
    assert (len(set(slots[:2])), len(set(slots[2:])), len(set(slots))) == (1, 1, 2)
    request = Request(body["prompt"], MODELS[0], seed=7, steps=10, width=64, height=64, count=5)
    seen: list[Progress] = []
    here = list(ServerEngine(two.url).generate(request, seen.append))
    right = [image["pixels_sha256"] for image in whole]
    assert [image["pixels_sha256"] for image in parts] == [image.pixels_sha256 for image in here] == right
    # The second part may be done before the first.
    assert {0, 1} <= {progress.image for progress in seen} <= set(range(5))


def test_a_request_is_not_divided_where_so_many_jobs_may_not_wait(tmp_path: Path) -> None:
    (tmp_path / "safelight.yaml").write_text("devices: [cpu:2]\nthreads: 2\nguest_max_waiting: 1\n")
    add_people(tmp_path)
    with serving.serving(tmp_path) as server, as_person(server, "ada") as admin, as_person(server, "gus") as guest:
        admin.post("/api/v1/queue/pause").raise_for_status()
        answers = [http.post("/api/v1/generate", json={**ASK, "count": 2, "spread": True}) for http in (admin, guest)]
        assert [len(answer.json()["jobs"]) for answer in answers] == [2, 1]


@pytest.mark.parametrize(
    ("ways", "parts"),
    [
        ([{"dtype": "bf16"}, {"dtype": "bf16"}], [(7, 2), (9, 3)]),
        ([{"dtype": "bf16"}, {"dtype": "fp32"}], [(7, 5)]),
        ([{"dtype": "bf16"}, None], [(7, 5)]),
        ([], [(7, 5)]),
    ],
)
def test_a_request_is_divided_only_among_slots_that_compute_alike(ways: list[Any], parts: list[Any]) -> None:
    def slot(way: Any) -> Any:
        return SimpleNamespace(takes_jobs=True, supervisor=SimpleNamespace(run_settings=lambda _: way))

    control: Any = SimpleNamespace(dispatcher=SimpleNamespace(slots=[slot(way) for way in ways]))
    divided = intake._parts(control, Request("x", "m", seed=7, count=5))
    assert [(one.seed, one.count) for one in divided] == parts


def test_a_slot_whose_worker_dies_gives_its_job_to_the_other(two: serving.Server) -> None:
    with two.client() as http:
        [right] = hashes(http, [queue(http, steps=6)])
        http.post("/api/v1/slots/cpu:1/drain")
        job = queue(http, steps=60, seed=5)
        while http.get(f"/api/v1/jobs/{job}").json()["state"] != "running":
            time.sleep(0.02)
        http.post("/api/v1/slots/cpu:1/resume")
        http.post("/api/v1/slots/cpu:0/restart")
        done = ended(http, job)
        assert (done["state"], done["slot"], done["attempts"]) == ("done", "cpu:1", 2)
        wait_until_ready(two, 2)
        assert hashes(http, [queue(http, steps=6)])[0][1:] == right[1:]


def test_pause_drain_and_ready_are_said(two: serving.Server) -> None:
    with two.client() as http:
        assert http.get("/api/v1/ready").json() == {"ready": True, "slots": {"cpu:0": "ready", "cpu:1": "ready"}}
        assert http.post("/api/v1/queue/pause").status_code == 204
        assert http.get("/api/v1/ready").status_code == 503
        job = queue(http)
        time.sleep(0.3)
        assert http.get(f"/api/v1/jobs/{job}").json()["state"] == "queued"
        assert http.post("/api/v1/slots/cpu:0/drain").json()["draining"]
        assert http.post("/api/v1/queue/resume").status_code == 204
        assert ended(http, job)["slot"] == "cpu:1"
        assert http.get("/api/v1/ready").json()["slots"]["cpu:0"] == "draining"
        http.post("/api/v1/slots/cpu:0/resume")
        assert http.post("/api/v1/slots/nobody/drain").status_code == 404
        assert http.get("/api/v1/memory", params={"slot": "cpu:1"}).json()["places"]["host"]
        assert http.get("/api/v1/memory", params={"slot": "nobody"}).status_code == 404
        assert 'safelight_switches_total{slot="cpu:1"}' in http.get("/metrics").text


@pytest.mark.full
def test_the_page_shows_every_slot(two: serving.Server) -> None:
    with sync_playwright() as playwright:
        path = next(path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{two.url}/settings")
        slots = page.locator(".slot")
        expect(slots).to_have_count(2)
        slots.last.get_by_role("button", name="Take no more jobs").click()
        expect(slots.last).to_contain_text("takes no more jobs")
        slots.last.get_by_role("button", name="Take jobs again").click()
        expect(slots.last).to_contain_text("ready")
        page.get_by_role("button", name="Pause the queue").click()
        page.get_by_role("button", name="Continue the queue").click()
        expect(page.get_by_role("button", name="Pause the queue")).to_be_visible()
        browser.close()


@pytest.mark.full
def test_slots_of_two_kinds_and_workers_that_are_killed(tmp_path: Path) -> None:
    """Each job ends once with the pixels of its kind of device, while workers are killed all the time."""
    (tmp_path / "safelight.yaml").write_text("devices: [cpu:2, simulated:2]\nthreads: 2\nmax_queue_size: 1000\n")
    with serving.serving(tmp_path) as server:
        wait_until_ready(server, 4)
        with server.client() as http:
            jobs = [queue(http, model=MODELS[number % 3], steps=3, seed=number % 5) for number in range(60)]
            left = set(jobs)
            while left:
                workers = serving.children(server.process.pid)
                os.kill(workers[len(left) % len(workers)], signal.SIGKILL)
                time.sleep(4)
                left = {job for job in left if http.get(f"/api/v1/jobs/{job}").json()["ended"] is None}
            pixels: dict[tuple[str, str, int], set[str]] = {}
            for number, job in enumerate(jobs):
                done = http.get(f"/api/v1/jobs/{job}").json()
                if done["state"] != "done":
                    # Its worker was killed twice: then it fails, and says so.
                    assert (done["failure"], done["attempts"]) == ("worker", 2), done
                    continue
                images = http.get(f"/api/v1/jobs/{job}/images").json()
                assert len(images) == 1
                key = (done["slot"].partition(":")[0], images[0]["model"], number % 5)
                pixels.setdefault(key, set()).add(images[0]["pixels_sha256"])
            assert all(len(found) == 1 for found in pixels.values()), pixels


@pytest.mark.parametrize(
    ("devices", "device", "names"),
    [
        (("auto",), "cpu", ["cpu"]),
        (("cpu:2",), "auto", ["cpu:0", "cpu:1"]),
        (("cuda:0", "cuda:3", "cpu"), "auto", ["cuda:0", "cuda:3", "cpu"]),
        (("simulated:2", "cpu:1"), "auto", ["simulated:0", "simulated:1", "cpu:0"]),
    ],
)
def test_devices_become_slots(devices: tuple[str, ...], device: Any, names: list[str], tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, devices=devices, device=device, threads=8, max_cache_ram_gb=12.0)
    plans = plan_slots(settings)
    assert [plan.name for plan in plans] == names
    if len(plans) > 1:
        assert {plan.settings.max_cache_ram_gb for plan in plans} == {12.0 / len(plans)}
        on_cpu = [plan for plan in plans if plan.settings.device == "cpu"]
        assert {plan.settings.threads for plan in on_cpu} <= {8 // len(on_cpu)}
    for plan in plans:
        gpu = plan.name.partition(":")[2]
        assert plan.environment == ({"CUDA_VISIBLE_DEVICES": gpu} if plan.name.startswith("cuda:") else {})


def test_each_gpu_of_this_machine_is_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert [plan.name for plan in plan_slots(Settings(root=tmp_path))] == ["cuda:0", "cuda:2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [plan.name for plan in plan_slots(Settings(root=tmp_path))] == ["auto"]


@pytest.mark.parametrize("devices", [("cpu:0",), ("cpu", "cpu"), ("mps:2",), ("CPU",), ("cuda:0", "cuda:0")])
def test_a_slot_that_cannot_be_is_refused_by_name(devices: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="devices"):
        plan_slots(Settings(root=tmp_path, devices=devices))


FIVE: tuple[str, ...] = ("ada", "max", "eve", "gus", "zoe")

JOBS, MINUTES, KILL_SECONDS = 2000, 10, 5.0


@pytest.mark.proof
def test_two_thousand_jobs_of_five_people_while_workers_are_killed(tmp_path: Path) -> None:
    """Each job ends once with the pixels of its kind of device, and the bounds of the queue hold."""
    add_people(tmp_path, Person("zoe", "member"))
    text = "devices: [cpu:2, simulated:2]\nthreads: 2\nguest_max_waiting: 10000\n"
    (tmp_path / "safelight.yaml").write_text(text)
    chance = random.Random(5)
    with serving.serving(tmp_path) as server:
        server.key = key_of("ada")
        wait_until_ready(server, 4)
        clients = {name: as_person(server, name) for name in FIVE}
        jobs: dict[str, tuple[str, int]] = {}
        for number in range(JOBS):
            name = FIVE[number % 5]
            body = {**ASK, "model": MODELS[number % 3], "steps": 1, "seed": number % 5, "width": 64, "height": 64}
            jobs[clients[name].post("/api/v1/generate", json=body).json()["id"]] = name, number
        begun, killed, worst = time.monotonic(), 0, 0.0
        while (waiting := ended_jobs(clients["ada"], JOBS)) and len(waiting) < JOBS:
            workers = serving.children(server.process.pid)
            if workers and time.monotonic() - begun < MINUTES * 60:
                os.kill(chance.choice(workers), signal.SIGKILL)
                killed += 1
            worst = max(worst, lead(waiting, jobs))
            time.sleep(KILL_SECONDS)
            assert time.monotonic() - begun < 3 * MINUTES * 60, len(waiting)
        found = ended_jobs(clients["ada"], JOBS)
        pixels: dict[tuple[str, str, int], set[str]] = {}
        done = 0
        for job in found:
            assert job["overtaken"] <= 64
            if job["state"] != "done":
                assert (job["failure"], job["attempts"]) == ("worker", 2), job
                continue
            done += 1
            [image] = clients["ada"].get(f"/api/v1/jobs/{job['id']}/images").json()
            key = job["slot"].partition(":")[0], image["model"], jobs[job["id"]][1] % 5
            pixels.setdefault(key, set()).add(image["pixels_sha256"])
        assert all(len(one) == 1 for one in pixels.values()), pixels
        count = clients["ada"].get("/api/v1/images/count").json()["count"]
        seconds = time.monotonic() - begun
        print(
            f"{JOBS} jobs of five people in {seconds:.0f} s, {killed} workers killed: {done} done, {JOBS - done} failed"
            f" after two deaths, {count} images, lead of a person at most {worst:.1f} s"
        )
        assert count == done
        assert worst <= 60 + KILL_SECONDS * 4
        assert done > 0.8 * JOBS
        for client in clients.values():
            client.close()


def ended_jobs(http: httpx.Client, most: int) -> list[dict[str, Any]]:
    """All jobs that have ended, in pages; a list that is not empty, also at the beginning."""
    found: list[dict[str, Any]] = []
    before: int | None = None
    while True:
        params: dict[str, Any] = {"limit": 1000, "state": ["done", "failed", "cancelled"]}
        params |= {} if before is None else {"before": before}
        page = http.get("/api/v1/jobs", params=params).json()
        found += page
        if len(page) < 1000 or len(found) >= most:
            return found or [{}]
        before = page[-1]["number"]


def lead(found: list[dict[str, Any]], jobs: dict[str, tuple[str, int]]) -> float:
    """By how many seconds of computing the most served of five people is ahead of the least served."""
    served = dict.fromkeys(FIVE, 0.0)
    for job in found:
        if job:
            served[jobs[job["id"]][0]] += job["ended"] - job["started"]
    if any(sum(1 for job in found if job and jobs[job["id"]][0] == name) >= JOBS // 5 for name in FIVE):
        return 0.0
    return max(served.values()) - min(served.values())
