"""What a client needs to ask for images: fields, families, tokens, presets, input images, settings, the catalogue."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image as PILImage
from support import serving
from support.serving import Server

from safelight.families.registry import families
from safelight.request.field import fields_of
from safelight.request.schema import Request
from safelight.settings import SECRETS, Settings


def test_each_field_of_a_request_is_described(http: httpx.Client) -> None:
    found = http.get("/api/v1/fields").json()
    assert [one["name"] for one in found["request"]] == list(fields_of(Request))
    by_name = {one["name"]: one for one in found["request"]}
    assert (by_name["steps"]["kind"], by_name["steps"]["minimum"], by_name["steps"]["default"]) == ("whole", 1, None)
    assert by_name["schedule"]["kind"] == "choice"
    assert "karras" in by_name["schedule"]["choices"]
    assert (by_name["loras"]["kind"], by_name["lenient"]["kind"]) == ("list", "switch")


def test_each_family_says_what_its_variants_refuse(http: httpx.Client) -> None:
    found = http.get("/api/v1/families").json()
    by_name = {one["name"]: one for one in found["families"]}
    assert by_name.keys() == families().keys()
    sd1 = by_name["sd1"]
    assert "negative" not in sd1["variants"]["text-to-image"]["refused"]
    assert sd1["variants"]["inpainting"]["needs"] == ["image", "mask"]
    assert "karras" in sd1["samplers"]["dpmpp_2m"]
    # Distilled: no negative prompt, and a scale that is an input.
    dev = by_name["flux"]["variants"]["dev"]
    assert dev["refused"]["negative"] == "a negative prompt"
    assert dev["guidance"] is not None


@pytest.mark.parametrize(
    ("prompt", "model", "counted"),
    [
        ("", "", {"CLIP": (0, 0, 75)}),
        ("red apple", "starter-noto", {"CLIP": (2, 0, 75)}),
        ("(red:1.2) apple <lora:ink:1>", "starter-noto", {"CLIP": (2, 0, 75)}),
        (", ".join(["apple"] * 50), "starter-noto", {"CLIP": (99, 0, 75)}),
        ("red apple", "starter-flux", {"CLIP": (2, 75, 0), "T5 1.1": (2, 511, 0)}),
    ],
)
def test_tokens_are_counted(
    prompt: str, model: str, counted: dict[str, tuple[int, int, int]], http: httpx.Client
) -> None:
    found = http.post("/api/v1/tokens", json={"prompt": prompt, "model": model}).json()
    assert found["problem"] == ""
    assert {one["name"]: (one["tokens"], one["most"], one["chunk"]) for one in found["encoders"]} == counted


def test_what_is_wrong_with_a_prompt_is_said(http: httpx.Client) -> None:
    found = http.post("/api/v1/tokens", json={"prompt": "<lora:ink:x>", "model": "starter-noto"}).json()
    assert found["encoders"] == []
    assert found["problem"]
    assert http.post("/api/v1/tokens", json={"prompt": "x", "model": "nobody"}).status_code == 404


def test_presets_have_fields_that_a_request_can_have(http: httpx.Client) -> None:
    assert http.put("/api/v1/presets/quick 快", json={"fields": {"steps": 4}}).json() == {"fields": {"steps": 4}}
    assert http.put("/api/v1/presets/quick 快", json={"fields": {"steps": 5}}).status_code == 200
    assert http.get("/api/v1/presets").json()["quick 快"] == {"fields": {"steps": 5}}
    for wrong in ({"tempo": 1}, {"loras": "a"}, {"steps": "many"}, {"steps": 0}):
        assert http.put("/api/v1/presets/wrong", json={"fields": wrong}).status_code == 422, wrong
    huge = {"prompt": "", "image": "data:image/png;base64," + "A" * 70_000}
    assert "at most 65536 are stored" in http.put("/api/v1/presets/huge", json={"fields": huge}).json()["message"]
    assert http.delete("/api/v1/presets/quick 快").status_code == 204
    assert http.delete("/api/v1/presets/quick 快").status_code == 404


def test_an_input_image_is_stored_and_given_back(http: httpx.Client) -> None:
    out = io.BytesIO()
    PILImage.new("RGB", (24, 16), "red").save(out, "PNG")
    text = base64.b64encode(out.getvalue()).decode()
    stored = http.post("/api/v1/inputs", json={"image": f"data:image/png;base64,{text}"}).json()
    assert (stored["width"], stored["height"]) == (24, 16)
    with PILImage.open(io.BytesIO(http.get(f"/api/v1/inputs/{stored['digest']}").content)) as picture:
        assert picture.getpixel((3, 3)) == (255, 0, 0)
    assert http.post("/api/v1/inputs", json={"image": text, "field": "mask"}).status_code == 201
    for wrong in ("é", "bm8gcGljdHVyZQ==", "a"):
        assert http.post("/api/v1/inputs", json={"image": wrong}).status_code == 422, wrong
    assert http.get(f"/api/v1/inputs/{'0' * 64}").status_code == 404


def test_settings_are_shown_with_their_source(http: httpx.Client, server: Server) -> None:
    found = {one["name"]: one for one in http.get("/api/v1/settings").json()}
    assert found.keys() == Settings.model_fields.keys()
    assert (found["root"]["value"], found["root"]["origin"]) == (str(server.root), "--root")
    assert found["spare_worker"]["origin"] == "SAFELIGHT_SPARE_WORKER"
    assert all(found[name]["value"] is None for name in SECRETS)
    changed = http.put("/api/v1/settings/default_seed", json={"value": "7"}).json()
    assert (changed["value"], changed["stored"], changed["changes"]) == (None, 7, True)
    assert http.put("/api/v1/settings/default_seed", json={"value": None}).json()["changes"] is False


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("api_key_file", "/etc/passwd", 403),
        ("api_key", "x", 403),
        ("download_folder", "/tmp", 403),
        ("model_folders", "/", 403),
        ("trash_days", "0", 403),
        ("max_body_bytes", "1", 403),
        ("spare_worker", "true", 403),
        ("nothing", "1", 404),
        ("image_quality", "500", 422),
        ("image_quality", "2020-13-45", 422),
        ("image_quality", "[" * 3000, 422),
        ("default_model", None, 422),
    ],
)
def test_clients_change_harmless_settings_only(name: str, value: str | None, status: int, http: httpx.Client) -> None:
    assert http.put(f"/api/v1/settings/{name}", json={"value": value}).status_code == status


@pytest.mark.full
def test_a_setting_that_something_stronger_sets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_CANARY", "off")
    with serving.serving(tmp_path / "root") as server, server.client() as http:
        answer = http.put("/api/v1/settings/canary", json={"value": "switch"})
        assert (answer.status_code, "SAFELIGHT_CANARY" in answer.text) == (409, True)


def test_the_catalogue_says_what_fits(http: httpx.Client) -> None:
    found = http.get("/api/v1/catalogue").json()
    assert found["memory_gb"] > 1
    assert found["may_download"] is True
    small = http.get("/api/v1/catalogue", params={"memory_gb": 8, "family": "z-image"}).json()["bundles"]
    assert small
    assert all(one["memory_gb"] <= 8 and one["family"] == "z-image" for one in small)
    assert all(file["cite"] for one in small for file in one["files"])


def test_waiting_jobs_are_moved_and_cancelled_together(http: httpx.Client) -> None:
    jobs = [serving.make(http, steps=150)["id"] for _ in range(4)]
    assert http.patch(f"/api/v1/jobs/{jobs[3]}", json={"priority": 5}).json()["priority"] == 5
    assert http.get("/api/v1/queue").json()["waiting"][0]["job"]["id"] == jobs[3]
    assert set(http.post("/api/v1/queue/cancel").json()["ids"]) == set(jobs[1:])
    assert http.patch(f"/api/v1/jobs/{jobs[1]}", json={"priority": 1}).status_code == 409
    assert http.patch(f"/api/v1/jobs/{jobs[0]}", json={"priority": 101}).status_code == 422
    http.post(f"/api/v1/jobs/{jobs[0]}/cancel")


def test_a_prompt_with_choices_names_all_its_jobs(http: httpx.Client) -> None:
    queued = serving.make(http, prompt="{red|green} apple", count=3)
    assert len(set(queued["jobs"])) == 3
    assert queued["jobs"][0] == queued["id"]
    for job in queued["jobs"]:
        serving.ended(http, job)


@pytest.mark.full
def test_the_doctor_examines_for_a_client(tmp_path: Path) -> None:
    with serving.serving(tmp_path / "root", real=True) as server, server.client() as http:
        assert http.get("/api/v1/doctor").json()["state"] == "never"
        assert http.post("/api/v1/doctor").json()["state"] == "running"
        assert http.post("/api/v1/doctor").status_code == 422
        with http.stream("GET", "/api/v1/events", timeout=900) as stream:
            assert next(line for line in stream.iter_lines() if line == "event: doctor")
        found = http.get("/api/v1/doctor").json()
        assert (found["state"], found["problem"]) == ("done", "")
        assert {one["suspect"] for one in found["report"]["findings"]} >= {"loading", "state", "memory"}
