"""What a request would take, and what a ControlNet would see."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage
from support import serving

from safelight.pipeline.preprocess import preprocess
from safelight.request.adapters import Control

PROMPT = {"prompt": "red apple", "model": "starter-noto", "steps": 4}


def test_time_and_memory_of_a_request(http: httpx.Client) -> None:
    queued = serving.make(http, **PROMPT)
    job = serving.ended(http, queued["id"])
    found = http.post("/api/v1/estimate", json={**PROMPT, "count": 3}).json()
    assert (found["model"], found["count"], found["basis"]) == ("starter-noto", 3, "this model")
    assert found["seconds"] == pytest.approx(3 * found["image_seconds"] + found["switch_seconds"])
    took = job["ended"] - job["started"]
    assert 0 < found["image_seconds"] < 10 * took
    assert found["fits"] is True
    assert {one["component"] for one in found["memory"]} == {"unet", "text_encoder", "vae"}
    assert all(one["total"] > 0 and one["working"] > 0 for one in found["memory"])
    more = http.post("/api/v1/estimate", json={**PROMPT, "steps": 40}).json()
    assert more["image_seconds"] > found["image_seconds"]


def test_an_estimate_uses_the_models_defaults_and_queues_nothing(http: httpx.Client) -> None:
    before = len(http.get("/api/v1/jobs").json())
    serving.ended(http, serving.make(http, **PROMPT)["id"])
    unsaid = http.post("/api/v1/estimate", json={"prompt": "x", "model": "starter-noto"}).json()
    said = http.post("/api/v1/estimate", json={**PROMPT, "steps": 4}).json()
    assert unsaid["image_seconds"] > said["image_seconds"]
    assert len(http.get("/api/v1/jobs").json()) == before + 1
    assert http.post("/api/v1/estimate", json={"prompt": "x", "model": "nobody"}).status_code == 404
    assert http.post("/api/v1/estimate", json={"prompt": "x", "steps": 0}).status_code == 422


def test_each_model_says_how_long_a_switch_to_it_takes(http: httpx.Client) -> None:
    serving.ended(http, serving.make(http, **PROMPT)["id"])
    serving.ended(http, serving.make(http, **{**PROMPT, "model": "starter-fluent"})["id"])
    assert all(one["switch_seconds"] > 0 for one in http.get("/api/v1/models").json())
    assert http.get("/api/v1/models/starter-noto").json()["switch_seconds"] > 0


def test_a_preprocessor_shows_what_it_makes(http: httpx.Client) -> None:
    picture = PILImage.fromarray(np.random.default_rng(4).integers(0, 255, (48, 64, 3), np.uint8))
    out = io.BytesIO()
    picture.save(out, "PNG")
    encoded = base64.b64encode(out.getvalue()).decode()
    digest = http.post("/api/v1/inputs", json={"image": encoded, "field": "controls"}).json()["digest"]
    answer = http.post("/api/v1/preprocess", json={"image": digest, "preprocessor": "canny", "low": 50, "high": 90})
    assert answer.headers["content-type"] == "image/png"
    made = np.asarray(PILImage.open(io.BytesIO(answer.content)))
    expected = preprocess(picture, Control("x", digest, preprocessor="canny", low=50, high=90))
    assert np.array_equal(made, np.asarray(expected))
    unknown = http.post("/api/v1/preprocess", json={"image": digest, "preprocessor": "nobody"})
    assert unknown.status_code == 422
    assert "canny" in unknown.json()["message"]
    missing = http.post("/api/v1/preprocess", json={"image": "0" * 64, "preprocessor": "canny"})
    assert missing.status_code == 404
