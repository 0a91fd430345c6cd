"""The package ``openai`` as it comes from PyPI, against a real server."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from support.serving import Server, serving

import safelight


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert "starter-noto" in [model.id for model in client.models.list()]
    assert client.models.retrieve("starter-noto").id == "starter-noto"
    with pytest.raises(openai.NotFoundError, match="starter-noto"):
        client.models.retrieve("starter-nto")


def test_images_as_base64_and_by_url(client: openai.OpenAI) -> None:
    ask = {"model": "starter-noto", "prompt": "red apple", "size": "64x64", "extra_body": {"seed": 5, "steps": 2}}
    answer = client.images.generate(**ask, n=2, response_format="b64_json")  # type: ignore
    assert answer.data is not None
    files = [base64.b64decode(datum.b64_json or "") for datum in answer.data]
    assert len(files) == 2
    assert Image.open(io.BytesIO(files[0])).size == (64, 64)
    by_url = client.images.generate(**ask)  # type: ignore
    assert by_url.data is not None
    assert by_url.data[0].url is not None
    pixels = Image.open(io.BytesIO(httpx.get(by_url.data[0].url).content)).tobytes()
    assert pixels == Image.open(io.BytesIO(files[0])).tobytes()
    assert answer.model == "starter-noto"  # type: ignore[attr-defined]


def test_errors_in_its_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="dall-e-3", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.images.generate(model="starter-noto", prompt="x", size="huge")  # type: ignore
    assert wrong.value.param == "size"


def test_the_key(tmp_path: Path) -> None:
    with serving(tmp_path, key="a long secret") as server:
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="a long secret").models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="another").models.list()


def test_edits_are_those_of_an_engine_that_knows_no_server(client: openai.OpenAI, tmp_path: Path) -> None:
    """What is transparent in the mask is drawn anew; the rest stays."""
    values = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    picture = Image.fromarray(values)
    hole = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (16, 16, 48, 48))
    white = Image.new("L", (64, 64), 0)
    white.paste(255, (16, 16, 48, 48))
    for name, image in (("picture", picture), ("hole", hole), ("white", white)):
        image.save(tmp_path / f"{name}.png")
    right = next(
        safelight.open_engine(tmp_path / "root").generate(
            safelight.Request(
                "red apple",
                "starter-noto",
                seed=5,
                steps=4,
                image=str(tmp_path / "picture.png"),
                mask=str(tmp_path / "white.png"),
            )
        )
    )
    answer = client.images.edit(
        model="starter-noto",
        prompt="red apple",
        image=(tmp_path / "picture.png").open("rb"),
        mask=(tmp_path / "hole.png").open("rb"),
        response_format="b64_json",
        extra_body={"seed": 5, "steps": 4},
    )
    assert answer.data is not None
    made = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).convert("RGB")
    assert made.tobytes() == right.pixels
    assert np.array_equal(np.asarray(made)[:2], values[:2])
    with pytest.raises(openai.UnprocessableEntityError, match="no transparency"):
        client.images.edit(
            model="starter-noto",
            prompt="x",
            image=(tmp_path / "picture.png").open("rb"),
            mask=(tmp_path / "white.png").open("rb"),
        )
