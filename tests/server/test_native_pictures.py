"""Pictures of any program, read over HTTP."""

from __future__ import annotations

import base64

import httpx
import pytest
from support.foreign_pictures import NEGATIVE, PICTURES, PROMPT, png


@pytest.mark.parametrize("label", ["A1111, JPEG", "ComfyUI"])
def test_a_picture_of_another_program(label: str, http: httpx.Client) -> None:
    answer = http.post("/api/v1/pictures/read", json={"image": base64.b64encode(PICTURES[label]()).decode()})
    assert answer.status_code == 200
    found = answer.json()
    assert found["prompt"].startswith(PROMPT)
    assert found["negative"] == NEGATIVE


def test_a_picture_that_says_nothing_and_one_that_is_none(http: httpx.Client) -> None:
    plain = base64.b64encode(png()).decode()
    assert http.post("/api/v1/pictures/read", json={"image": f"data:image/png;base64,{plain}"}).json() is None
    refused = http.post("/api/v1/pictures/read", json={"image": "bm8gcGljdHVyZQ=="})
    assert refused.status_code == 422
    assert "cannot be read" in refused.text
