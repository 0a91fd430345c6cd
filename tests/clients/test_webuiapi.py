"""The package ``webuiapi`` as it comes from PyPI, against a real server."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import requests
import webuiapi
from PIL import Image
from support.scale import times
from support.serving import Server, serving

import safelight


def client(server: Server) -> webuiapi.WebUIApi:
    where = urlsplit(server.url)
    return webuiapi.WebUIApi(host=where.hostname, port=where.port, sampler="Euler", steps=2)


def pixels(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def right() -> dict[tuple[str, int], str]:
    """By an engine that knows no server: three models, four seeds."""
    engine = safelight.open_engine()
    made = {}
    for model in ("starter-noto", "starter-fluent", "starter-twemoji"):
        request = safelight.Request("red apple", model, steps=2, width=64, height=64, count=4)
        made |= {(model, image.seed): image.pixels_sha256 for image in engine.generate(request)}
    return made


def test_lists(server: Server) -> None:
    api = client(server)
    assert "starter-noto" in [model["model_name"] for model in api.get_sd_models()]
    assert "Euler a" in api.util_get_sampler_names()
    assert "Karras" in [scheduler["label"] for scheduler in api.get_schedulers()]
    assert {lora["name"] for lora in api.get_loras()} >= {"ink", "turned"}
    assert api.get_sd_vae() == []
    assert api.get_embeddings()["loaded"] == {}
    assert api.get_upscalers()[0]["name"] == "None"
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    assert api.get_progress()["progress"] == 0.0
    assert api.custom_get("internal/ping", baseurl=False) is not None or True


def test_an_image_and_what_it_carries(server: Server, right: dict[tuple[str, int], str]) -> None:
    api = client(server)
    result = api.txt2img(
        prompt="red apple",
        seed=2,
        width=64,
        height=64,
        override_settings={"sd_model_checkpoint": "starter-fluent"},
    )
    assert pixels(result.image) == right["starter-fluent", 2]
    assert result.info["sd_model_name"] == "starter-fluent"
    assert "Model: starter-fluent" in api.png_info(result.image).info
    batch = api.txt2img(prompt="red apple", seed=0, width=64, height=64, batch_size=2, n_iter=2)
    assert [pixels(image) for image in batch.images] == [right["starter-fluent", seed] for seed in range(4)]


@pytest.fixture
def own_server(tmp_path: Path) -> Generator[Server]:
    """A server whose clients' options no other test sees."""
    with serving(tmp_path) as made:
        made.ready()
        yield made


def test_state_19_a_model_that_one_client_sets_is_that_clients(
    own_server: Server, right: dict[tuple[str, int], str]
) -> None:
    server = own_server
    one, other = client(server), client(server)
    one.util_set_model("starter-noto")
    other.util_set_model("starter-twemoji")
    assert one.util_get_current_model().startswith("starter-noto")
    assert other.util_get_current_model().startswith("starter-twemoji")
    for api, model in ((one, "starter-noto"), (other, "starter-twemoji"), (one, "starter-noto")):
        image = api.txt2img(prompt="red apple", seed=1, width=64, height=64).image
        assert pixels(image) == right[model, 1]
    # A connection of neither is not guessed for.
    answer = requests.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "red apple", "steps": 2}, timeout=60)
    assert answer.status_code == 409
    assert "override_settings" in answer.json()["detail"]


def test_the_whole_options_object_can_be_posted_back(own_server: Server) -> None:
    server = own_server
    api = client(server)
    api.util_set_model("starter-noto")
    options = api.get_options()
    assert api.set_options(options) == {}
    assert "samples_format" in api.set_options({"samples_format": "jpg"})["detail"]
    assert api.get_options()["sd_model_checkpoint"] == options["sd_model_checkpoint"]
    with pytest.raises(RuntimeError):
        api.txt2img(prompt="x", sampler_name="No such sampler")


def test_what_cannot_be_done_is_an_error(server: Server) -> None:
    model = {"sd_model_checkpoint": "starter-noto"}
    for wish in (
        {"hr_upscaler": "4x", "enable_hr": True},
        {"restore_faces": True},
        {"script_name": "X/Y"},
        {"styles": ["anime"]},
    ):
        answer = requests.post(
            f"{server.url}/sdapi/v1/txt2img", json={"prompt": "x", "override_settings": model, **wish}, timeout=60
        )
        assert answer.status_code == 422
        assert next(iter(wish)) in answer.json()["detail"]


@pytest.mark.parametrize(("prompt", "images"), [("red apple", 1), ("{red|green} apple", 2)])
def test_progress_and_interrupt(prompt: str, images: int, server: Server) -> None:
    """Choices in a prompt make a job for each image; both are of one request."""
    api = client(server)
    seen: list[dict] = []

    def look() -> None:
        other = client(server)
        while not seen:
            now = other.get_progress()
            if now["progress"] > 0:
                seen.append(now)
                other.interrupt()
            time.sleep(0.02)

    watcher = threading.Thread(target=look)
    watcher.start()
    model = {"sd_model_checkpoint": "starter-noto"}
    result = api.txt2img(prompt=prompt, n_iter=images, width=64, height=64, steps=150, override_settings=model)
    watcher.join()
    assert result.images == []
    assert result.info["interrupted"]
    assert seen[0]["state"]["job_count"] == images
    assert seen[0]["progress"] < 1 / images
    assert Image.open(io.BytesIO(base64.b64decode(seen[0]["current_image"]))).size == (8, 8)


def both(server: Server, right: dict[tuple[str, int], str], each: int) -> None:
    """Two webuiapi clients and an openai client at once, each with its own model: every image is the right one."""

    def a1111(model: str) -> None:
        api = client(server)
        api.util_set_model(model)
        for turn in range(each):
            result = api.txt2img(prompt="red apple", seed=turn % 4, width=64, height=64)
            assert pixels(result.image) == right[model, turn % 4]
            assert result.info["sd_model_name"] == model

    def other(model: str) -> None:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for turn in range(each):
            answer = api.images.generate(
                model=model,
                prompt="red apple",
                size="64x64",  # type: ignore
                response_format="b64_json",
                extra_body={"seed": turn % 4, "steps": 2},
            )
            assert answer.data is not None
            image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
            assert pixels(image) == right[model, turn % 4]
            assert answer.model == model  # type: ignore[attr-defined]

    with ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(a1111, "starter-noto"),
            pool.submit(a1111, "starter-fluent"),
            pool.submit(other, "starter-twemoji"),
        ]
        for future in work:
            future.result()


@pytest.mark.full
def test_clients_at_once_each_get_their_models_images(server: Server, right: dict[tuple[str, int], str]) -> None:
    both(server, right, times(5, 15))


@pytest.mark.proof
def test_clients_at_once_200_requests_each(server: Server, right: dict[tuple[str, int], str]) -> None:
    both(server, right, 200)


def test_image_to_image_and_inpainting(server: Server, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.new("RGB", (64, 64), "black")
    mask.paste("white", (16, 16, 48, 48))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    engine = safelight.open_engine(tmp_path / "root")
    asked = {"steps": 4, "seed": 3, "image": str(tmp_path / "picture.png"), "width": 64, "height": 64}
    ways = {
        "whole": ({}, {}),
        "masked": ({"mask_image": mask, "inpaint_full_res": False}, {"mask": str(tmp_path / "mask.png")}),
        "only masked": (
            {"mask_image": mask, "inpaint_full_res": True, "inpaint_full_res_padding": 4},
            {"mask": str(tmp_path / "mask.png"), "mask_padding": 4},
        ),
    }
    for theirs, ours in ways.values():
        answer = client(server).img2img(
            images=[picture], prompt="red apple", seed=3, steps=4, width=64, height=64, denoising_strength=0.75,
            inpainting_fill=1,
            override_settings={"sd_model_checkpoint": "starter-noto"}, **theirs,
        )  # fmt: skip
        right = next(engine.generate(safelight.Request("red apple", "starter-noto", **asked, **ours)))
        assert pixels(answer.image) == right.pixels_sha256


def test_extras(server: Server) -> None:
    api = client(server)
    noise = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    picture = Image.fromarray(noise)
    twice = api.extra_single_image(picture, upscaler_1="Lanczos", upscaling_resize=2).image
    assert pixels(twice) == pixels(picture.resize((60, 40), Image.Resampling.LANCZOS))
    exact = api.extra_single_image(
        picture, resize_mode=1, upscaling_resize_w=50, upscaling_resize_h=50, upscaler_1="Nearest"
    ).image
    assert pixels(exact) == pixels(picture.resize((75, 50), Image.Resampling.NEAREST).crop((12, 0, 62, 50)))
    both = api.extra_batch_images([picture, picture.rotate(180)], upscaler_1="Nearest", upscaling_resize=3).images
    assert [one.size for one in both] == [(90, 60), (90, 60)]
    assert pixels(both[1]) == pixels(picture.rotate(180).resize((90, 60), Image.Resampling.NEAREST))
    mixed = api.extra_single_image(
        picture, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=1
    ).image
    assert pixels(mixed) == pixels(picture.resize((60, 40), Image.Resampling.NEAREST))


def test_what_extras_cannot_do_is_refused(server: Server) -> None:
    api = client(server)
    picture = Image.new("RGB", (30, 20))
    for refused in ({"gfpgan_visibility": 0.5}, {"upscaler_1": "R-ESRGAN 4x+"}, {"upscaling_resize": 100}):
        with pytest.raises(RuntimeError, match="422"):
            api.extra_single_image(picture, **refused)


def test_extras_have_the_limits_of_other_pictures(server: Server) -> None:
    api = client(server)
    picture = Image.new("RGB", (1000, 1000))
    with pytest.raises(RuntimeError, match="422"):
        api.extra_batch_images([picture] * 8, upscaler_1="Nearest", upscaling_resize=4)


def test_models_leave_memory_and_come_back(server: Server) -> None:
    api = client(server)
    model = {"sd_model_checkpoint": "starter-noto"}
    api.txt2img(prompt="red apple", steps=1, width=64, height=64, override_settings=model)
    url = f"{server.url}/sdapi/v1"
    assert requests.post(f"{url}/unload-checkpoint", timeout=60).status_code == 200
    assert requests.get(f"{server.url}/api/v1/memory", timeout=60).json()["places"]["host"]["resident"] == []
    assert requests.post(f"{url}/reload-checkpoint", timeout=60).status_code == 200
    assert requests.get(f"{server.url}/api/v1/memory", timeout=60).json()["places"]["host"]["resident"]
    for path in ("refresh-vae", "refresh-embeddings", "refresh-checkpoints", "refresh-loras"):
        assert requests.post(f"{url}/{path}", timeout=60).status_code == 200
    assert [one["name"] for one in requests.get(f"{url}/script-info", timeout=60).json()] == ["controlnet"] * 2
    assert requests.get(f"{url}/extensions", timeout=60).json() == []
    refused = requests.post(f"{url}/interrogate", json={"image": "", "model": "clip"}, timeout=60)
    assert (refused.status_code, "describes pictures" in refused.text) == (422, True)
