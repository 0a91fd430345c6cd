"""The package ``openai`` as it comes from PyPI, against a real server."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from support.serving import Server, serving

import safelight
from safelight.pictures import infotext


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


PLAIN = {"model": "starter-noto", "prompt": "red apple", "size": "64x64", "seed": 5, "steps": 2}


def pixels(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    (datum,) = answer.json()["data"]
    return Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))).convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"negative": "red"}, {"negative_prompt": "red"}),
        ({"cfg": 2.0}, {"cfg_scale": 2}),
        ({"cfg": 2.0}, {"guidance_scale": 2.0}),
        ({"sampler": "dpmpp_2m", "schedule": "karras"}, {"sampler_name": "DPM++ 2M Karras"}),
        ({"sampler": "dpmpp_2m", "schedule": "karras"}, {"sampler_name": "DPM++ 2M", "scheduler": "Karras"}),
    ],
)
def test_other_programs_names_for_fields_are_done(http: httpx.Client, ours: dict, theirs: dict) -> None:
    made = [
        pixels(http.post("/v1/images/generations", json={**PLAIN, "response_format": "b64_json", **more}))
        for more in (ours, theirs, {})
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    "more",
    [
        {"step": 50},
        {"lora": "ink"},
        {"background": "transparent"},
        {"style": "natural"},
        {"input_fidelity": "high"},
        {"num_inference_steps": 3},
        {"quality": "hd"},
        {"strength": 0.5},
        {"cfg": 2, "cfg_scale": 3},
        {"nonsense": None},
    ],
)
def test_what_cannot_be_done_is_refused_by_name(http: httpx.Client, more: dict) -> None:
    answer = http.post("/v1/images/generations", json={**PLAIN, **more})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] in (*more, "quality")


def test_neutral_values_are_taken_and_newer_fields_answer_with_the_picture(http: httpx.Client) -> None:
    plain = pixels(http.post("/v1/images/generations", json={**PLAIN, "response_format": "b64_json"}))
    neutral = {"background": "auto", "moderation": "auto", "stream": False, "partial_images": 0, "quality": "auto"}
    assert pixels(http.post("/v1/images/generations", json={**PLAIN, **neutral, "user": "me"})) == plain
    for form in ("jpeg", "webp"):
        answer = http.post("/v1/images/generations", json={**PLAIN, "output_format": form, "output_compression": 90})
        with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as image:
            assert image.format == form.upper()
            text, _ = infotext.read(image)
            assert infotext.fields(text)["Seed"] == "5"
        body = {**PLAIN, "output_format": form, "output_compression": 90, "response_format": "url"}
        url = http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        with Image.open(io.BytesIO(http.get(url).content)) as image:
            assert image.format == form.upper()
            _, items = infotext.read(image)
            assert json.loads(items["safelight"])["encoding"] == f"{form}, quality 90"
    assert http.get(url, params={"format": "gif"}).status_code == 422
    assert http.get(url, params={"quality": 0}).status_code == 422


def test_a_list_of_one_picture_is_edited_and_two_are_refused(client: openai.OpenAI, http: httpx.Client) -> None:
    held = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(held, "PNG")
    picture = ("a.png", held.getvalue(), "image/png")
    for given in (picture, [picture]):
        ask = {"model": "starter-noto", "image": given, "prompt": "x", "extra_body": {"steps": 2}}
        assert len(client.images.edit(**ask).data) == 1  # type: ignore[call-overload]
    for key in ("image", "image[]"):
        data = {"prompt": "x", "model": "starter-noto", "steps": "2"}
        two = http.post("/v1/images/edits", data=data, files=[(key, picture), (key, picture)])
        assert (two.status_code, "only one picture" in two.text) == (422, True)
        odd = http.post("/v1/images/edits", data={**data, "strenght": "0.1"}, files=[(key, picture)])
        assert (odd.status_code, odd.json()["error"]["param"]) == (422, "strenght")
    twice = [("image", picture), ("negative", (None, "a")), ("negative", (None, "b"))]
    again = http.post("/v1/images/edits", data=data, files=twice)
    assert (again.status_code, again.json()["error"]["param"], "given 2 times" in again.text) == (422, "negative", True)
    file = http.post("/v1/images/edits", data=data, files=[("image", picture), ("negative", picture)])
    assert (file.status_code, "must be a text" in file.text) == (422, True)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"output_compression": 50}, "output_compression"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"seed": True}, "seed"),
        ({"n": True}, "n"),
        ({"sampler": "DPM++ 2M Karras", "schedule": "exponential"}, "schedule"),
    ],
)
def test_what_would_not_be_done_as_asked_is_refused(http: httpx.Client, given: dict, field: str) -> None:
    answer = http.post("/v1/images/generations", json={**PLAIN, **given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)


def test_a_samplers_name_says_its_schedule_on_every_surface(http: httpx.Client) -> None:
    named = {**PLAIN, "response_format": "b64_json", "sampler": "DPM++ 2M Karras"}
    karras = {**PLAIN, "response_format": "b64_json", "sampler": "dpmpp_2m", "schedule": "karras"}
    right = pixels(http.post("/v1/images/generations", json=karras))
    assert pixels(http.post("/v1/images/generations", json=named)) == right
    assert pixels(http.post("/v1/images/generations", json={**named, "schedule": "default"})) == right


def test_the_key(tmp_path: Path) -> None:
    with serving(tmp_path, key="a long secret") as server:
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="a long secret").models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="another").models.list()


def test_edits_are_those_of_an_engine_that_knows_no_server(client: openai.OpenAI, tmp_path: Path) -> None:
    """What is transparent in the mask is drawn again; the rest stays."""
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


@pytest.mark.parametrize("form", ["png", "webp"])
def test_a_stream_of_previews_and_images(client: openai.OpenAI, form: str) -> None:
    ask: dict[str, Any] = {"model": "starter-noto", "prompt": "red apple", "size": "64x64", "output_format": form}
    body = {"seed": 5, "steps": 6}
    events = list(client.images.generate(**ask, n=2, stream=True, partial_images=2, extra_body=body))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"] * 2
    assert [event.partial_image_index for event in events if event.type.endswith("partial_image")] == [0, 1, 0, 1]
    pictures = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events]
    assert {(picture.size, picture.format) for picture in pictures} == {((64, 64), form.upper())}
    right = client.images.generate(**ask, n=2, response_format="b64_json", extra_body=body)
    files = [Image.open(io.BytesIO(base64.b64decode(datum.b64_json or ""))) for datum in right.data or ()]
    made = [picture for picture, kind in zip(pictures, kinds, strict=True) if kind == "completed"]
    assert [picture.tobytes() for picture in made] == [picture.tobytes() for picture in files]
    assert len({picture.tobytes() for picture in pictures}) == 6


def test_a_stream_of_an_edit(client: openai.OpenAI) -> None:
    start = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(start, "PNG")
    start.name = "start.png"
    start.seek(0)
    ask: dict[str, Any] = {"model": "starter-noto", "prompt": "apple", "extra_body": {"seed": 5, "steps": 4}}
    events = list(client.images.edit(image=start, stream=True, partial_images=1, **ask))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_stream_that_cannot_be(client: openai.OpenAI, http: httpx.Client) -> None:
    for wrong in (
        {"partial_images": 1},
        {"stream": True, "response_format": "url"},
        {"stream": True, "partial_images": 4},
    ):
        answer = http.post("/v1/images/generations", json={**PLAIN, **wrong})
        assert answer.status_code == 422, answer.text
    with pytest.raises(openai.NotFoundError):
        list(client.images.generate(model="none", prompt="x", stream=True))


def test_a_client_that_leaves_a_stream_ends_its_job(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/images/generations", json={**PLAIN, "steps": 100, "n": 8, "stream": True}) as answer:
        job = next(one for one in http.get("/api/v1/jobs").json() if one["client"].startswith("openai"))
        assert answer.status_code == 200
    until = time.monotonic() + 20
    while http.get(f"/api/v1/jobs/{job['id']}").json()["state"] not in ("cancelled", "done"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert http.get(f"/api/v1/jobs/{job['id']}").json()["state"] == "cancelled"


def cancel_the_first(http: httpx.Client, prompt: str) -> list[dict[str, Any]]:
    """Wait for two jobs whose prompts end so, cancel the first one, and return both."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = [job for job in http.get("/api/v1/jobs").json() if job["request"]["prompt"].endswith(prompt)]
        if len(found) == 2:
            http.post(f"/api/v1/jobs/{found[1]['id']}/cancel")
            return found
        time.sleep(0.02)
    raise AssertionError(prompt)


def test_a_cancelled_request_is_not_sent_again(server: Server, http: httpx.Client) -> None:
    """OpenAI's client repeats requests by itself, as it is installed."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed")
    ask: dict[str, Any] = {"model": "starter-noto", "n": 2, "size": "64x64", "extra_body": {"steps": 40}}
    with ThreadPoolExecutor(1) as other:
        cancelled = other.submit(cancel_the_first, http, "cancelled fox")
        with pytest.raises(openai.ConflictError):
            client.images.generate(prompt="a {red|green} cancelled fox", **ask)
        jobs = cancelled.result()
    latest = http.get("/api/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in latest] == [job["id"] for job in jobs]


def test_a_stream_says_at_its_end_that_a_job_was_cancelled(client: openai.OpenAI, http: httpx.Client) -> None:
    ask: dict[str, Any] = {"model": "starter-noto", "n": 2, "size": "64x64", "extra_body": {"steps": 40}}
    events: list[str] = []
    with ThreadPoolExecutor(1) as other:
        cancelled = other.submit(cancel_the_first, http, "streamed fox")
        with pytest.raises(openai.APIError, match="cancelled"):
            events += [
                event.type for event in client.images.generate(prompt="a {red|green} streamed fox", stream=True, **ask)
            ]
        jobs = cancelled.result()
    assert [http.get(f"/api/v1/jobs/{job['id']}").json()["state"] for job in jobs] == ["done", "cancelled"]


def test_variations_of_a_picture(client: openai.OpenAI) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    answer = client.images.create_variation(
        image=("red.png", picture.getvalue(), "image/png"),
        model="starter-noto",
        n=2,
        size="64x64",  # type: ignore[arg-type]
        response_format="b64_json",
        extra_body={"steps": 4, "seed": 5},
    )
    files = [base64.b64decode(datum.b64_json or "") for datum in answer.data or ()]
    pictures = [Image.open(io.BytesIO(file)) for file in files]
    assert len({one.tobytes() for one in pictures}) == 2
    request = json.loads(pictures[0].info["safelight"])["request"]
    assert (request["prompt"], request["strength"], request["seed"]) == ("", 0.5, 5)
    assert request["image"]


def test_what_a_variation_does_not_use_is_refused(http: httpx.Client) -> None:
    held = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(held, "PNG")
    picture = ("red.png", held.getvalue(), "image/png")
    for name, value in (("prompt", "a dog"), ("mask", "x"), ("image[]", "x"), ("image", "x")):
        files = [("image", picture), (name, (None, value) if name == "prompt" else picture)]
        answer = http.post("/v1/images/variations", data={"model": "starter-noto"}, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, name), answer.text
    for value in ("inf", "nan"):
        answer = http.post("/v1/images/generations", json={**PLAIN, "num_inference_steps": value})
        assert answer.status_code == 422, answer.text
    assert http.get("/v1/models", headers={"Origin": "http://["}).status_code == 403
