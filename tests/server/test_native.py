"""Safelight's own API, over HTTP, against a real server."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file
from support import serving
from support.serving import ASK, Server, ended, make

import safelight
from safelight.pictures import chunks
from safelight.server import auth


@pytest.fixture(scope="module")
def right() -> dict[str, str]:
    """Pixels by an engine that knows no server."""
    engine = safelight.open_engine()
    names = ("starter-noto", "starter-fluent", "starter-twemoji")
    return {
        name: next(engine.generate(safelight.Request("red apple", name, seed=3, steps=2))).pixels_sha256
        for name in names
    }


def test_a_job_is_made_and_says_what_made_it(http: httpx.Client, right: dict[str, str], tmp_path: Path) -> None:
    """STATE 17: what the metadata says is what made the image."""
    for model in ("starter-noto", "starter-fluent", "starter-noto"):
        job = make(http, model=model)
        assert job["state"] in ("queued", "running", "done")
        assert ended(http, job["id"])["state"] == "done"
        (image,) = http.get(f"/api/v1/jobs/{job['id']}/images").json()
        assert image["pixels_sha256"] == right[model]
        assert image["model_digest"] == job["model_digest"] == image["metadata"]["model"]["digest"]
        (tmp_path / "x.png").write_bytes(http.get(image["url"]).content)
        metadata, pixels = chunks.read(tmp_path / "x.png")
        assert pixels == right[model]
        assert metadata["model"]["name"] == model
        assert http.get(image["thumbnail"]).headers["content-type"] == "image/webp"


def test_a_batch_has_consecutive_seeds(http: httpx.Client, right: dict[str, str]) -> None:
    job = ended(http, make(http, seed=2, count=3)["id"])
    images = http.get(f"/api/v1/jobs/{job['id']}/images").json()
    assert [image["seed"] for image in images] == [2, 3, 4]
    assert images[1]["pixels_sha256"] == right["starter-noto"]
    assert job["images"] == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {"model": "starter-noto", "size": "64x64"}),
        (
            "/sdapi/v1/txt2img",
            {"width": 64, "height": 64, "override_settings": {"sd_model_checkpoint": "starter-noto"}},
        ),
    ],
)
def test_a_client_that_goes_away_cancels_its_job(http: httpx.Client, path: str, body: dict) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(path, json={"prompt": path, "steps": 150, **body}, timeout=0.5)
    job = http.get("/api/v1/jobs").json()[0]
    assert job["request"]["prompt"] == path
    assert ended(http, job["id"])["state"] == "cancelled"


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/v1/images/nothing", "/sdapi/v1/nothing"])
def test_what_is_no_path_is_said_in_json(path: str, http: httpx.Client) -> None:
    # What has a route is remembered, and this is not.
    for _ in range(2):
        answer = http.get(path)
        assert (answer.status_code, path in json.dumps(answer.json())) == (404, True)
    assert http.get("/api/v1/generate").status_code == 405
    assert "text/html" in http.get("/").headers["content-type"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac does not tell what is mapped")
def test_the_server_has_no_torch(tmp_path: Path) -> None:
    """The worker has it as soon as it has begun, but the server never does."""

    def maps(pid: int) -> str:
        return " ".join(found.path for found in psutil.Process(pid).memory_maps())

    with serving.serving(tmp_path, real=True) as server:
        until = time.monotonic() + serving.READY_SECONDS
        while "libtorch" not in maps(server.worker()):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "libtorch" not in maps(server.process.pid)


def test_state_30_an_unknown_model_is_404_with_near_names(http: httpx.Client) -> None:
    answer = http.post("/api/v1/generate", json={**ASK, "model": "starter-nto"})
    assert answer.status_code == 404
    assert answer.json()["error"] == "model_not_found"
    assert "starter-noto" in answer.json()["near"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 100),
        ("steps", 100_000),
        ("steps", 151),
        ("sampler", "none"),
        ("count", 17),
        ("cfg", -1),
        ("clip_skip", 11),
        ("prompt", "x" * 20_001),
        ("prompt", None),
        ("negative", "a\0b"),
        ("unknown", 1),
    ],
)
def test_bad_fields_are_refused_before_they_are_queued(http: httpx.Client, field: str, value: object) -> None:
    before = len(http.get("/api/v1/jobs", params={"limit": 1000}).json())
    answer = http.post("/api/v1/generate", json={**ASK, field: value})
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field
    assert len(http.get("/api/v1/jobs", params={"limit": 1000}).json()) == before


def test_no_path_is_opened_as_a_model(http: httpx.Client, tmp_path: Path) -> None:
    for name in ("/etc/passwd", "../x", str(tmp_path / "x.safetensors"), "~/x.ckpt"):
        assert http.post("/api/v1/generate", json={**ASK, "model": name}).status_code == 404
        assert http.post("/api/v1/models", json={"path": name}).status_code == 403
    assert http.get("/api/v1/images/..%2F..%2Fetc/file").status_code in (404, 422)


def test_what_waits_and_what_runs_can_be_cancelled(http: httpx.Client) -> None:
    first = make(http, steps=150, count=4)
    second = make(http, steps=150)
    assert http.post(f"/api/v1/jobs/{second['id']}/cancel").json() == {"cancelled": True}
    assert ended(http, second["id"])["state"] == "cancelled"
    while not any(one["progress"] for one in http.get("/api/v1/queue").json()["running"]):
        time.sleep(0.02)
    assert http.post(f"/api/v1/jobs/{first['id']}/cancel").json() == {"cancelled": True}
    found = ended(http, first["id"])
    assert found["state"] == "cancelled"
    assert http.post(f"/api/v1/jobs/{first['id']}/cancel").json() == {"cancelled": False}
    assert ended(http, make(http)["id"])["state"] == "done"


def test_the_queue_says_its_order_and_why(http: httpx.Client) -> None:
    first = make(http, steps=30)
    others = [make(http, model=m, steps=1) for m in ("starter-fluent", "starter-noto")]
    urgent = make(http, model="starter-twemoji", steps=1, priority=5)
    queue = http.get("/api/v1/queue").json()
    order = [place["job"]["id"] for place in queue["waiting"]]
    if first["id"] in [one["job"]["id"] for one in queue["running"]]:
        assert order == [urgent["id"], others[1]["id"], others[0]["id"]] or order[0] == urgent["id"]
        assert all(place["reason"] for place in queue["waiting"])
    for job in (first, *others, urgent):
        assert ended(http, job["id"])["state"] == "done"


def test_events_tell_of_a_job_until_it_ends(http: httpx.Client) -> None:
    job = make(http, steps=20)
    kinds: list[str] = []
    previews = 0
    with http.stream("GET", "/api/v1/events", params={"job": job["id"]}) as stream:
        for line in stream.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                kinds.append(value)
            elif kind == "data":
                data = json.loads(value)
                assert data["job"] == job["id"]
                previews += "preview" in data
    assert previews == 20
    assert data["state"] == "done"
    assert {"job", "progress", "image", "memory"} <= set(kinds)
    assert kinds[-1] == "job"


def test_models_are_loaded_pinned_and_dropped(http: httpx.Client) -> None:
    digest = http.get("/api/v1/models/starter-twemoji").json()["digest"]
    ended(http, make(http, model="starter-twemoji")["id"])
    assert digest in http.post("/api/v1/models/starter-twemoji/pin").json()["resident"]
    assert http.get("/api/v1/models/starter-twemoji").json()["pinned"]
    assert digest in http.post("/api/v1/models/starter-twemoji/unload").json()["resident"]
    assert digest in http.post("/api/v1/models/starter-twemoji/unpin").json()["resident"]
    assert digest not in http.post("/api/v1/models/starter-twemoji/unload").json()["resident"]
    assert digest in http.post("/api/v1/models/starter-twemoji/load").json()["resident"]
    assert http.post("/api/v1/models/starter-twemoji/verify").json() == {"ok": True, "problem": ""}
    assert http.post("/api/v1/models/nobody/load").status_code == 404
    places = http.get("/api/v1/memory").json()["places"]
    assert places["host"]["stored"] > 0


def test_an_image_is_the_same_in_a_fresh_process(http: httpx.Client, right: dict[str, str]) -> None:
    job = ended(http, make(http)["id"])
    (image,) = http.get(f"/api/v1/jobs/{job['id']}/images").json()
    assert http.post(f"/api/v1/images/{image['id']}/check").json() == {
        "same": True,
        "pixels_sha256": right["starter-noto"],
    }


def test_what_is_counted_is_told_to_prometheus(http: httpx.Client) -> None:
    ended(http, make(http)["id"])
    text = http.get("/metrics").text
    for name in ("safelight_jobs_ended_total", "safelight_switches_total", "safelight_memory_bytes"):
        assert name in text


def test_pages_of_other_sites_are_refused(http: httpx.Client) -> None:
    assert http.get("/api/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.get("/api/v1/models", headers={"Host": "evil.example"}).status_code == 403
    own = str(http.base_url).rstrip("/")
    answer = http.get("/api/v1/models", headers={"Origin": own})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_one_root_has_one_server(server: Server) -> None:
    with pytest.raises(AssertionError):
        serving.start(server.root)


def test_the_key_is_asked_for_everywhere_but_health(tmp_path: Path) -> None:
    with serving.serving(tmp_path, key="a long secret") as server:
        with httpx.Client(base_url=server.url) as stranger:
            health = stranger.get("/api/v1/health").json()
            assert {name for name, value in health.items() if value} <= {"status", "worker"}
            for path in ("/api/v1/models", "/v1/models", "/sdapi/v1/sd-models", "/", "/metrics", "/internal/ping"):
                answer = stranger.get(path)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Basic"
            assert stranger.get("/api/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert stranger.get("/api/v1/models", auth=("anyone", "a long secret")).status_code == 200
        with server.client() as friend:
            assert friend.get("/api/v1/models").status_code == 200
            page = friend.get("/")
            assert page.status_code == 200
            cookie, again = (friend.get("/").cookies["safelight_session"] for _ in range(2))
            assert cookie != again
            assert "Secure" not in page.headers["set-cookie"]
            behind = friend.get("/", headers={"x-forwarded-proto": "https"})
            assert "Secure" in behind.headers["set-cookie"]
            assert friend.get("/api/v1/health").json()["version"]
        with httpx.Client(base_url=server.url, cookies={"safelight_session": cookie}) as browser:
            assert browser.get("/api/v1/models").status_code == 200
        for wrong in (cookie[:-1] + "x", f"9{cookie}", "", "a.b.c"):
            with httpx.Client(base_url=server.url, cookies={"safelight_session": wrong}) as stranger:
                assert stranger.get("/api/v1/models").status_code == 401
        assert (tmp_path / ".sessions").stat().st_mode & 0o777 == 0o600


def test_sessions_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = auth.Sessions(tmp_path, "a long secret")
    token = sessions.token()
    assert auth.Sessions(tmp_path, "a long secret").holds(token)
    assert not auth.Sessions(tmp_path, "another secret").holds(token)
    now = time.time()
    monkeypatch.setattr(auth.time, "time", lambda: now + auth.SESSION_SECONDS + 1)
    assert not sessions.holds(token)


@pytest.mark.parametrize(
    "path", ["/controlnet/nothing", "/internal/nothing", "/docs", "/redoc", "/sdapi/v1/none", "/v1/none", "/api/none"]
)
def test_unknown_paths_are_answered_in_each_apis_own_form(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    body = answer.json()
    if path.startswith("/v1/"):
        assert body["error"]["message"]
    else:
        assert ("detail" in body) is path.startswith(("/sdapi", "/controlnet", "/internal"))


@pytest.mark.full
def test_many_long_calls_leave_threads_for_the_rest(http: httpx.Client, server: Server) -> None:
    """Forty calls that read whole models or wait for the worker."""
    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(httpx.post, f"{server.url}/api/v1/models/{name}/{what}", timeout=120)
                 for what in ("verify", "load") for name in ["starter-noto", "starter-fluent"] * 10]  # fmt: skip
        slowest = 0.0
        for _ in range(10):
            start = time.monotonic()
            assert http.get("/api/v1/health").status_code == 200
            assert http.get("/api/v1/jobs").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
        assert all(call.result().status_code == 200 for call in calls)
    assert slowest < 2


def test_a_large_body_is_refused(tmp_path: Path, http: httpx.Client) -> None:
    answer = http.post("/api/v1/generate", content=b"x" * (33 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413

    def pieces():
        for _ in range(40):
            yield b" " * (1 << 20)

    answer = http.post("/api/v1/generate", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_memory_is_given_back_when_nothing_is_wanted(tmp_path: Path) -> None:
    """And the next job brings its model again."""
    (tmp_path / "safelight.yaml").write_text("idle_unload_seconds: 0.3\n")
    with serving.serving(tmp_path) as server, server.client() as http:
        pixels = set[str]()
        for _ in range(2):
            job = ended(http, make(http)["id"])
            pixels |= {image["pixels_sha256"] for image in http.get(f"/api/v1/jobs/{job['id']}/images").json()}
            until = time.monotonic() + 20
            while http.get("/api/v1/memory").json()["places"]["host"]["resident"]:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert len(pixels) == 1


@pytest.mark.parametrize("path", ["/api/v1/models/starter-noto/load", "/sdapi/v1/reload-checkpoint"])
def test_memory_is_given_back_if_a_model_was_loaded_without_a_job(path: str, tmp_path: Path) -> None:
    (tmp_path / "safelight.yaml").write_text("idle_unload_seconds: 1.0\n")
    with serving.serving(tmp_path) as server, server.client() as http:
        until = time.monotonic() + 60
        while http.post(path).status_code == 503:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert http.get("/api/v1/memory").json()["places"]["host"]["resident"]
        while http.get("/api/v1/memory").json()["places"]["host"]["resident"]:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_checkpoints_are_added_from_allowed_folders_only(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "safelight.yaml").write_text(f"model_folders: [{tiny}, {tmp_path}]\n")
    with serving.serving(tmp_path) as server, server.client() as http:
        answer = http.post("/api/v1/models", json={"path": str(tiny / "a.safetensors"), "name": "mine"})
        assert answer.status_code == 201, answer.text
        assert http.get("/api/v1/models/mine").json()["origin"] == "added"
        assert http.post("/api/v1/models", json={"path": f"{tiny}/../{tiny.name}/../x"}).status_code == 403
        assert http.post("/api/v1/models", json={"path": str(tiny / "none.safetensors")}).status_code == 422
        taken = http.post("/api/v1/models", json={"path": str(tiny / "b.safetensors"), "name": "mine"})
        assert (taken.status_code, taken.json()["error"]) == (422, "invalid_request"), taken.text
        tensors = load_file(tiny / "a.safetensors")
        name = next(name for name in tensors if "input_blocks.1" in name)
        del tensors[name]
        save_file(tensors, tmp_path / "short.safetensors")
        short = http.post("/api/v1/models", json={"path": str(tmp_path / "short.safetensors")})
        assert (short.status_code, short.json()["error"], name in short.text) == (422, "bad_file", True), short.text


def test_the_next_jobs_model_comes_while_this_one_computes(http: httpx.Client) -> None:
    for name in ("starter-noto", "starter-fluent", "starter-twemoji"):
        http.post(f"/api/v1/models/{name}/unload")
    # Several images, because readers of a prefetch have the lowest priority; the job is cancelled when both are there.
    first = make(http, model="starter-noto", steps=150, count=4)
    second = make(http, model="starter-fluent")
    seen = False
    while http.get(f"/api/v1/jobs/{first['id']}").json()["ended"] is None:
        resident = http.get("/api/v1/memory").json()["places"]["host"]["resident"]
        unets = {r["component"] for r in resident if r["component"].startswith("unet") and r["nbytes"] == r["total"]}
        seen = seen or len(unets) == 2
        if seen:
            http.post(f"/api/v1/jobs/{first['id']}/cancel")
        time.sleep(0.02)
    assert seen
    ended(http, second["id"])
    (image,) = http.get(f"/api/v1/jobs/{second['id']}/images").json()
    assert image["metadata"]["made"]["seconds"]["switch"] < 0.5


def test_messages_can_be_objects(tmp_path: Path) -> None:
    (tmp_path / "safelight.yaml").write_text("log_format: json\n")
    says = tmp_path / "messages"
    with serving.serving(tmp_path, says=says) as server, server.client() as http:
        job = make(http)
        assert ended(http, job["id"])["state"] == "done"
        assert serving.stop(server) == 0
    lines = [json.loads(line) for line in says.read_text().splitlines() if line.startswith("{")]
    assert any(line["event"] == "job" and line["job"] == job["id"] and line["state"] == "done" for line in lines)


def test_pages_of_other_sites_need_a_setting(http: httpx.Client, tmp_path: Path) -> None:
    elsewhere = {"Origin": "https://example.org"}
    refused = http.get("/api/v1/models", headers=elsewhere)
    assert (refused.status_code, "allow_origins" in refused.json()["message"]) == (403, True)
    (tmp_path / "allowing").mkdir()
    (tmp_path / "allowing/safelight.yaml").write_text("allow_origins: [https://example.org]\n")
    with serving.serving(tmp_path / "allowing") as server, server.client() as client:
        allowed = client.get("/api/v1/models", headers=elsewhere)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://example.org")
        asked = {**elsewhere, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
        assert client.options("/api/v1/generate", headers=asked).status_code == 200
        assert client.get("/api/v1/models", headers={"Origin": "https://example.com"}).status_code == 403


def test_waiting_jobs_start_in_the_order_that_is_set(http: httpx.Client) -> None:
    http.post("/api/v1/queue/pause")
    try:
        jobs = [make(http, model="starter-noto", steps=1)["id"] for _ in range(4)]
        wanted = [jobs[2], jobs[0], jobs[3], jobs[1]]
        assert http.put("/api/v1/queue/order", json={"ids": [*wanted, "0" * 32]}).json()["ids"] == wanted
        waiting = [place["job"]["id"] for place in http.get("/api/v1/queue").json()["waiting"]]
        assert [job for job in waiting if job in jobs] == wanted
    finally:
        http.post("/api/v1/queue/resume")
    found = {job: ended(http, job)["started"] for job in jobs}
    assert sorted(jobs, key=found.__getitem__) == wanted


def test_a_grid_is_queued_whole_or_not_at_all(http: httpx.Client) -> None:
    request = {"prompt": "red apple", "model": "starter-noto", "steps": 1, "seed": 4}
    found = http.post("/api/v1/grid", json={"request": request, "x": "cfg=1..3/2", "y": "seed=7,8"}).json()
    assert (found["columns"], found["rows"], len(found["cells"])) == (["1", "3"], ["7", "8"], 4)
    for cell in found["cells"]:
        made = ended(http, cell["job"])["request"]
        assert (made["cfg"], made["seed"]) == (float(found["columns"][cell["column"]]), int(found["rows"][cell["row"]]))
    before = len(http.get("/api/v1/jobs").json())
    for wrong in (
        {"x": "cfg=1,x"},
        {"x": "nothing=1"},
        {"x": "seed=1", "y": "seed=2"},
        {"x": "model=starter-noto,gone"},
    ):
        assert http.post("/api/v1/grid", json={"request": request, **wrong}).status_code in (404, 422)
    assert len(http.get("/api/v1/jobs").json()) == before
    assert {"model", "seed", "steps", "prompt"} <= set(http.get("/api/v1/grid/fields").json())
