"""A server with several slots: two on the CPU, and simulated accelerators."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from support import serving
from support.serving import ASK, ended

from safelight.assembly.slots import plan_slots
from safelight.errors import SettingError
from safelight.settings import Settings

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
