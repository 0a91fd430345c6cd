"""Every API gives a model's defaults to requests that do not say otherwise."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage
from support.serving import Server

from safelight.catalog.library import Library

DEFAULTS = {"width": 64, "height": 128, "steps": 2, "cfg": 3.5, "sampler": "heun", "schedule": "karras", "clip_skip": 1}

PLAIN: dict[str, dict[str, Any]] = {
    "a1111": {"width": 64, "height": 64, "steps": 1, "cfg_scale": 6.0, "sampler_name": "Euler", "clip_skip": 1},
    "openai": {"size": "64x64", "steps": 1, "cfg": 6.0, "sampler": "euler", "extra_body": None},
    "native": {"width": 64, "height": 64, "steps": 1, "cfg": 6.0, "sampler": "euler", "clip_skip": 0},
}


def a1111(http: httpx.Client, **more: Any) -> bytes:
    body = {"prompt": "x", "override_settings": {"sd_model_checkpoint": "with defaults"}, **more}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0])


def openai(http: httpx.Client, **more: Any) -> bytes:
    more.pop("extra_body", None)
    body = {"prompt": "x", "model": "with defaults", "response_format": "b64_json", **more}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def native(http: httpx.Client, **more: Any) -> bytes:
    answer = http.post("/api/v1/generate", json={"prompt": "x", "model": "with defaults", **more})
    assert answer.status_code < 300, answer.text
    job = answer.json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.1)
        job = http.get(f"/api/v1/jobs/{job['id']}").json()
    assert job["state"] == "done", job
    [image] = http.get(f"/api/v1/jobs/{job['id']}/images").json()
    return http.get(f"/api/v1/images/{image['id']}/file").content


@pytest.fixture
def library(server: Server, tiny: Path) -> Generator[Library]:
    """The library of the server that all tests share. Its own models are as before afterwards."""
    found = Library(server.root)
    found.add(tiny / "a.safetensors", "with defaults")
    yield found
    found.remove("with defaults")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("make", [a1111, openai, native])
def test_defaults_count_unless_a_request_says_otherwise(make: Callable[..., bytes], http: httpx.Client) -> None:
    answer = http.put("/api/v1/models/with defaults/defaults", json=DEFAULTS)
    assert (answer.status_code, answer.json()["defaults"]) == (200, DEFAULTS)
    with PILImage.open(io.BytesIO(make(http))) as picture:
        request = json.loads(picture.info["safelight"])["request"]
        assert picture.size == (64, 128)
    assert {name: request[name] for name in DEFAULTS} == DEFAULTS
    with PILImage.open(io.BytesIO(make(http, **PLAIN[make.__name__]))) as picture:
        request = json.loads(picture.info["safelight"])["request"]
    found = [request[name] for name in ("width", "height", "steps", "cfg", "sampler", "schedule")]
    assert found == [64, 64, 1, 6.0, "euler", "default"]
    assert request["clip_skip"] == (1 if make is openai else 0)
    [listed] = [one for one in http.get("/api/v1/models").json() if one["name"] == "with defaults"]
    assert listed["defaults"] == DEFAULTS


def test_what_cannot_be_a_default_is_refused(http: httpx.Client) -> None:
    for name, body, status in (
        ("starter-noto", {"steps": 3}, 422),
        ("nobody", {"steps": 3}, 404),
        ("starter-noto", {"steps": 0}, 422),
        ("starter-noto", {"seed": 1}, 422),
    ):
        answer = http.put(f"/api/v1/models/{name}/defaults", json=body)
        assert answer.status_code == status, answer.text
