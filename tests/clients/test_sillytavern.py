"""The requests that SillyTavern 1.19.0 sends to AUTOMATIC1111's API, in its order.

Source: ``src/endpoints/stable-diffusion.js`` and ``public/scripts/extensions/stable-diffusion/index.js`` of
https://github.com/SillyTavern/SillyTavern. Its own router, run against a recording server, sent these bodies.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.payloads import SILLYTAVERN
from support.serving import serving

BODY: dict[str, Any] = SILLYTAVERN | {
    "prompt": "a cat",
    "negative_prompt": "lowres",
    "sampler_name": "Euler",
    "scheduler": "karras",
    "steps": 2,
    "width": 64,
    "height": 64,
    "hr_scale": 1,
}


@pytest.fixture
def http(tmp_path: Path) -> Generator[httpx.Client]:
    """A client of a server of its own: it sets options, which hold for its address."""
    with serving(tmp_path) as server, server.client() as client:
        server.ready()
        yield client


def test_it_connects_chooses_a_model_and_makes_an_image(http: httpx.Client) -> None:
    headers = {"Authorization": "Basic", "User-Agent": "node-fetch"}

    def get(path: str) -> Any:
        answer = http.get(path, headers=headers)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    assert "sd_model_checkpoint" in get("/sdapi/v1/options")
    assert "Euler" in [row["name"] for row in get("/sdapi/v1/samplers")]
    titles = [row["title"] for row in get("/sdapi/v1/sd-models")]
    assert get("/sdapi/v1/upscalers")[0]["name"]
    assert get("/sdapi/v1/latent-upscale-modes")[0]["name"]
    assert "karras" in [row["name"] for row in get("/sdapi/v1/schedulers")]
    assert isinstance(get("/sdapi/v1/sd-vae"), list)
    title = next(one for one in titles if one.startswith("starter-noto"))
    assert http.post("/sdapi/v1/options", headers=headers, json={"sd_model_checkpoint": title}).status_code == 200
    progress = get("/sdapi/v1/progress")
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)
    assert "forge_preset" not in get("/sdapi/v1/options")
    body = {"url": str(http.base_url), "auth": "", **BODY}
    answer = http.post("/sdapi/v1/txt2img", headers=headers, json=body)
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).size == (64, 64)
    assert http.post("/sdapi/v1/interrupt", headers=headers).status_code == 200
    refused = http.post("/sdapi/v1/txt2img", headers=headers, json=body | {"scheduler": "normal"})
    assert (refused.status_code, "only for rectified flows" in refused.text) == (422, True)
