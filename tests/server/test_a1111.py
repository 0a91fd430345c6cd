"""Which model a title means, whose options count, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage
from support import other_programs, payloads, serving

from safelight.catalog.catalog import Catalog
from safelight.catalog.importing import import_files
from safelight.catalog.library import Library
from safelight.catalog.other_programs import read
from safelight.errors import ModelNotFoundError, RequestError
from safelight.pictures.chunks import schedule_label
from safelight.request.results import Progress
from safelight.request.samplers import SAMPLERS
from safelight.request.schema import Request
from safelight.server.apis import a1111_neutral
from safelight.server.apis.a1111_fields import ImageToImage, TextToImage, filled, refuse_unknown, sampler_of
from safelight.server.apis.a1111_progress import describe_progress
from safelight.server.apis.a1111_titles import by_title
from safelight.server.clients import CLIENTS, Client, Clients
from safelight.server.problems import RefusedError
from safelight.workers.job_runner import RunningJob


@pytest.fixture
def http(server: serving.Server) -> Generator[httpx.Client]:
    """A client with a name: what others set on the tests' common server does not apply to it."""
    with server.client(auth=("a1111", "")) as client:
        yield client


def test_state_19_a_name_is_never_another_models_file_name(tiny: Path, tmp_path: Path) -> None:
    library = Library(tmp_path)
    other = library.add(tiny / "b.safetensors", "a")
    model = library.add(tiny / "a.safetensors", "x")
    control: Any = SimpleNamespace(library=library)
    assert by_title(control, "a").digest == other.digest
    assert by_title(control, f"a [{other.digest[:10]}]").digest == other.digest
    assert by_title(control, "b").digest == other.digest
    assert by_title(control, model.digest[:10]).name == "x"
    with pytest.raises(RefusedError, match="not 0123456789"):
        by_title(control, "a [0123456789]")
    library.add(tiny / "b.safetensors", "again")
    with pytest.raises(RefusedError, match="a, again"):
        by_title(control, "b.safetensors")
    with pytest.raises(ModelNotFoundError):
        by_title(control, "nobody")


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("hr_upscaler", {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}),
        ("hr_resize_y", {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 256}),
        ("init_images", {"init_images": ["iVBORw0KGgo="]}),
        ("eta", {"eta": 0, "sampler_name": "Euler a"}),
        ("eta", {"eta": 1, "sampler_name": "DDIM"}),
        ("s_noise", {"s_noise": 0.9, "sampler_name": "DPM++ SDE"}),
        ("initial_noise_multiplier", {"initial_noise_multiplier": 0}),
        ("hr_prompt", {"enable_hr": True, "hr_prompt": "something else"}),
        ("hr_sampler_name", {"enable_hr": True, "hr_sampler_name": "DDIM"}),
        (
            "controlnet.hr_option",
            {"alwayson_scripts": {"controlnet": {"args": [{"hr_option": "Low res only"}]}}, "enable_hr": True},
        ),
        ("override_settings.emphasis", {"override_settings": {"emphasis": "None"}}),
        ("override_settings.comma_padding_backtrack", {"override_settings": {"comma_padding_backtrack": 0}}),
        ("alwayson_scripts", {"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face_yolov8n.pt"}]}}}),
        ("alwayson_scripts", {"alwayson_scripts": {"Refiner": {"args": [True, "other"]}}}),
        ("alwayson_scripts", {"alwayson_scripts": {"FreeU Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [True, 1.01]}}}),
        ("alwayson_scripts", {"alwayson_scripts": {"Somebody's": {"args": [0]}}}),
        ("nonsense", {"nonsense": 0}),
        ("nonsense", {"nonsense": None}),
        ("clip_skip", {"clip_skip": 3, "override_settings": {"CLIP_stop_at_last_layers": 2}}),
        ("firstphase_width", {"firstphase_width": 64}),
        ("mask_round", {"mask_round": False}),
        ("override_settings.nonsense", {"override_settings": {"nonsense": 0}}),
        ("controlnet.module", {"alwayson_scripts": {"controlnet": {"args": [{"module": "openpose_full"}]}}}),
        ("alwayson_scripts", {"alwayson_scripts": {"controlnet": [{"model": "edges"}]}}),
        ("alwayson_scripts", {"alwayson_scripts": {"controlnet": "x"}}),
        ("controlnet.threshold", {"alwayson_scripts": {"controlnet": {"args": [{"threshold_a": "x"}]}}}),
        ("controlnet.resize_mode", {"alwayson_scripts": {"controlnet": {"args": [{"resize_mode": "Larger"}]}}}),
        ("controls", {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges"}]}}}),
        ("some_new_field", {"some_new_field": "x"}),
        ("CLIP_stop_at_last_layers", {"override_settings": {"CLIP_stop_at_last_layers": "2"}}),
        ("CLIP_stop_at_last_layers", {"override_settings": {"CLIP_stop_at_last_layers": 1.5}}),
        ("CLIP_stop_at_last_layers", {"override_settings": {"CLIP_stop_at_last_layers": 0}}),
    ],
)
def test_what_cannot_be_done_is_refused_and_not_ignored(http: httpx.Client, field: str, body: dict) -> None:
    model = {"sd_model_checkpoint": "starter-noto", **body.pop("override_settings", {})}
    body = {"prompt": "x", "steps": 1, "width": 64, "height": 64, **body, "override_settings": model}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 422
    assert field in answer.json()["detail"]


def test_what_clients_send_without_meaning_it_is_taken(http: httpx.Client) -> None:
    """SillyTavern's fields."""
    body = {
        "prompt": "x",
        "steps": 1,
        "width": 64,
        "height": 64,
        "sampler_name": "Euler",
        "scheduler": "Automatic",
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "clip_skip": 1,
        "save_images": True,
        "do_not_save_grid": False,
        "override_settings": {
            "sd_model_checkpoint": "starter-noto",
            "CLIP_stop_at_last_layers": 2.0,
            "sd_vae": "Automatic",
            "forge_additional_modules": [],
        },
    }
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert '"clip_skip": 2' in answer.json()["info"]


PAGES = {name: value for name, value in vars(payloads).items() if name.startswith(("TXT2IMG", "IMG2IMG", "SILLY"))}


@pytest.mark.parametrize("name", PAGES)
def test_whole_requests_of_pages_and_clients_are_taken(name: str) -> None:
    """Every field at the value that asks for nothing."""
    body = {key: value for key, value in PAGES[name].items() if key != "init_images"}
    if name.startswith("IMG2IMG"):
        picture = base64.b64encode(_png(PILImage.new("RGB", (64, 64), "red"))).decode()
        asked = ImageToImage.model_validate({**body, "init_images": [picture], "mask": picture})
    else:
        asked = TextToImage.model_validate(body)
    refuse_unknown(asked)
    assert asked.given()["controls"] == ()


def test_every_field_of_the_pages_is_refused_when_it_asks_for_something() -> None:
    """No field is let through whatever it says, but for those that have no effect over A1111's own API."""
    for name, rule in a1111_neutral.FIELDS.items():
        if rule is a1111_neutral.anything:
            continue
        with pytest.raises(RequestError, match=name):
            refuse_unknown(TextToImage.model_validate({name: "something else"}))


@pytest.mark.parametrize(("sent", "used"), [(None, 1.5), (0, 1.5), (2.5, 2.5)])
def test_image_cfg_scale(sent: float | None, used: float) -> None:
    """A1111's clients send 0 for a field that is not set."""
    picture = base64.b64encode(_png(PILImage.new("RGB", (64, 64), "red"))).decode()
    asked = ImageToImage.model_validate({"init_images": [picture], "image_cfg_scale": sent})
    assert Request("x", "a", **asked.given()).image_cfg == used


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ({}, None),
        ({"refiner_checkpoint": "", "refiner_switch_at": 0}, None),
        ({"refiner_checkpoint": "xl", "refiner_switch_at": 1}, None),
        ({"refiner_checkpoint": "xl [0123456789]", "refiner_switch_at": 0.8}, ("xl [0123456789]", 0.8)),
        ({"alwayson_scripts": {"Refiner": {"args": [True, "xl", 0.6]}}}, ("xl", 0.6)),
        ({"refiner_checkpoint": "xl", "alwayson_scripts": {"Refiner": {"args": [False, "xl", 0.6]}}}, None),
    ],
)
def test_the_refiner_is_that_of_the_fields_or_of_the_script(sent: dict[str, Any], found: object) -> None:
    asked = TextToImage.model_validate(sent)
    refuse_unknown(asked)
    assert asked.refiner() == found


def test_progress_goes_by_the_steps_that_the_model_computes() -> None:
    """A model that starts from noise computes 4 steps, where the request alone tells 3."""
    job: Any = SimpleNamespace(
        request=Request("x", "a", steps=4, image="in.png", count=2), id="1", ended=None, images=0
    )
    said = describe_progress(RunningJob(job, 0.0, Progress("denoise", 1, 2, 4)), skip_image=True)
    assert (said["progress"], said["state"]["sampling_step"], said["state"]["sampling_steps"]) == (0.75, 2, 4)


def _png(image: PILImage.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def test_what_surrounds_a_mask_flows_into_it() -> None:
    picture = PILImage.new("RGB", (64, 64), (200, 40, 40))
    picture.paste((0, 0, 255), (16, 16, 48, 48))
    mask = PILImage.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    made = np.asarray(filled(picture, mask)).astype(int)
    assert np.abs(made - (200, 40, 40)).max() < 8
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    outside = np.asarray(mask) == 0
    assert (np.asarray(filled(noise, mask))[outside] == np.asarray(noise)[outside]).all()


def test_options_that_mean_something_else_are_refused_and_set_nothing(http: httpx.Client) -> None:
    before = http.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
    answer = http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "starter-noto", "upcast_attn": True})
    assert (answer.status_code, "upcast_attn" in answer.json()["detail"]) == (422, True)
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == before
    assert http.post("/sdapi/v1/options", json={"samples_save": False, "eta_noise_seed_delta": 0}).json() == {}


def test_state_19_who_sets_nothing_takes_nobodys_place() -> None:
    clients = Clients()
    one = Client("connection 1", "127.0.0.1", "", named=False)
    clients.set(one, {"sd_model_checkpoint": "a"})
    for number in range(2, CLIENTS + 10):
        other = Client(f"connection {number}", "127.0.0.1", "", named=False)
        clients.set(other, {})
        assert clients.option(other, "sd_model_checkpoint") == "a"
    assert clients.option(one, "sd_model_checkpoint") == "a"


def test_a_vae_that_is_not_there_is_an_error(http: httpx.Client) -> None:
    options = {"sd_model_checkpoint": "starter-noto", "sd_vae": "vae-ft-mse"}
    body = {"prompt": "x", "steps": 1, "width": 64, "height": 64, "override_settings": options}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert (answer.status_code, "vae-ft-mse" in answer.json()["detail"]) == (404, True)


def made(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The answer of txt2img by a starter, and what Safelight says of its first image."""
    body = {"prompt": "red apple", "seed": 3, "steps": 3, "width": 64, "height": 64, "sampler_name": "Euler"}
    options = {"sd_model_checkpoint": "starter-noto", **fields.pop("override_settings", {})}
    answer = http.post("/sdapi/v1/txt2img", json={**body, **fields, "override_settings": options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def carried(answer: dict[str, Any], at: int = 0) -> dict[str, Any]:
    with PILImage.open(io.BytesIO(base64.b64decode(answer["images"][at]))) as image:
        return {**json.loads(image.info["safelight"])["request"], "size": image.size, "text": image.info["parameters"]}


def test_high_resolution_fix(http: httpx.Client) -> None:
    found = carried(made(http, enable_hr=True, hr_scale=1.5, hr_upscaler="Lanczos", denoising_strength=0.5))
    assert (found["size"], found["width"], found["hires_upscaler"]) == ((96, 96), 64, "lanczos")
    assert "Hires upscale: 1.5" in found["text"]
    assert carried(made(http, enable_hr=True, hr_resize_x=128))["size"] == (128, 128)


def test_a_controlnet_of_the_extension(http: httpx.Client) -> None:
    picture = made(http)["images"][0]
    listed = http.get("/controlnet/model_list").json()["model_list"]
    assert listed[0].startswith("edges [")
    assert "canny" in http.get("/controlnet/module_list").json()["module_list"]
    unit = {
        "enabled": True,
        "module": "canny",
        "model": listed[0],
        "image": picture,
        "weight": 0.7,
        "pixel_perfect": True,
    }
    unit |= {"guidance_end": 0.9, "control_mode": "ControlNet is more important", "threshold_a": -1, "threshold_b": -1}
    answer = made(http, prompt="octopus", alwayson_scripts={"ControlNet": {"args": [unit, {"enabled": False}]}})
    [control] = carried(answer)["controls"]
    assert (control["name"], control["weight"], control["end"]) == ("edges", 0.7, 0.9)
    assert (control["mode"], control["preprocessor"], control["high"]) == ("more_control", "canny", 200)
    scripts = {"ControlNet": {"args": [{**unit, "union_control_type": "Depth"}]}}
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "x", "alwayson_scripts": scripts})
    assert answer.status_code == 422
    assert "controls='depth': edges reads one type of pictures" in answer.text


def test_variations_tiling_and_choices(http: httpx.Client) -> None:
    answer = made(http, subseed=7, subseed_strength=0.3, batch_size=2, tiling=True)
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["all_subseeds"], info["subseed_strength"]) == ([3, 3], [7, 8], 0.3)
    assert carried(answer)["seamless"] == "xy"
    answer = made(http, prompt="{red|green} apple", batch_size=3)
    prompts = [carried(answer, at)["prompt"] for at in range(3)]
    assert set(prompts) <= {"red apple", "green apple"}
    assert json.loads(answer["info"])["all_prompts"] == prompts


@pytest.mark.parametrize(
    ("sampler", "scheduler", "found"),
    [
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Uniform", ("dpmpp_2m", "default")),
        ("DPM++ 2M SDE", "automatic", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("Euler", None, ("euler", "default")),
        ("Euler", "sgm_uniform", ("euler", "sgm_uniform")),
    ],
)
def test_automatic_schedules_are_those_of_a1111(sampler: str, scheduler: str | None, found: tuple[str, str]) -> None:
    assert sampler_of(sampler, scheduler) == found
    # What an image says is read as the same again.
    assert sampler_of(SAMPLERS[found[0]].a1111, schedule_label(*found)) == found


def test_state_19_every_option_holds_for_an_address_that_agrees() -> None:
    clients = Clients()
    first, second, third = (Client(f"connection {n}", "127.0.0.1", "", named=False) for n in range(3))
    clients.set(first, {"sd_vae": "x", "CLIP_stop_at_last_layers": 2})
    assert (clients.option(second, "sd_vae"), clients.option(second, "CLIP_stop_at_last_layers")) == ("x", 2)
    clients.set(third, {"sd_vae": "y"})
    assert clients.option(third, "sd_vae") == "y"
    assert clients.option(second, "CLIP_stop_at_last_layers") == 2
    with pytest.raises(RefusedError, match="different sd_vae"):
        clients.option(second, "sd_vae")


def test_an_option_that_is_no_vae_is_refused(http: httpx.Client) -> None:
    answer = http.post("/sdapi/v1/options", json={"sd_vae": "ink"})
    assert (answer.status_code, "not a VAE" in answer.json()["detail"]) == (422, True)
    metadata = http.get("/sdapi/v1/loras").json()[0]["metadata"]
    assert "/" not in metadata["path"]


def test_an_unknown_refiner_is_a_wrong_value_of_its_field(http: httpx.Client) -> None:
    for body in (
        {"refiner_checkpoint": "nobody", "refiner_switch_at": 0.8},
        {"alwayson_scripts": {"Refiner": {"args": [True, "nobody", 0.8]}}},
    ):
        answer = http.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": 2, "width": 64, "height": 64, **body})
        assert answer.status_code == 422
        assert "refiner_checkpoint='nobody'" in answer.json()["detail"]


def test_titles_of_models_that_were_imported(tmp_path: Path, tiny: Path) -> None:
    for name in ("ckpt/a", "more/a", "k1/model", "k2/b"):
        other_programs.put(tiny / "a.safetensors", tmp_path / f"models/{name}.safetensors")
    catalog = Catalog.under(tmp_path / "root")
    list(import_files(read(tmp_path / "models").candidates, catalog, lambda _: ""))
    catalog.library.rename("b", "tmp")
    catalog.library.rename("model", "b")
    with serving.serving(tmp_path / "root") as server, server.client() as http:
        titles = [one["title"] for one in http.get("/sdapi/v1/sd-models").json()]
        assert {"a", "a (more)", "b", "tmp"} <= set(titles)
        # Asking reads nothing.
        assert http.get("/sdapi/v1/options").status_code == 200
        assert http.get("/api/v1/models/b").json()["digest"] == ""
        assert len(Catalog.under(tmp_path / "root").library.unread.all()) == 4
        for title, file in (("a", "ckpt/a"), ("a (more)", "more/a"), ("b", "k1/model")):
            assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": title}).status_code == 200
            card = Catalog.under(tmp_path / "root").library.records.card(title)
            assert card is not None
            assert card.path == tmp_path / f"models/{file}.safetensors"
        assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nothing[v2]"}).status_code == 404


def test_pictures_of_another_shape() -> None:
    """1 cuts off what is too wide, 2 adds the colours of the edges; 0 changes the shape."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    wide = PILImage.new("RGB", (128, 64))
    for number, colour in enumerate(colours):
        wide.paste(colour, (number * 32, 0, number * 32 + 32, 64))
    held = io.BytesIO()
    wide.save(held, "PNG")
    sent = base64.b64encode(held.getvalue()).decode()

    def fitted(mode: int) -> PILImage.Image:
        asked = ImageToImage(init_images=[sent], width=64, height=64, resize_mode=mode)
        return PILImage.open(io.BytesIO(base64.b64decode(asked.given()["image"].rpartition(",")[2])))

    assert fitted(0).size == (128, 64)
    cut, added = fitted(1), fitted(2)
    assert cut.size == added.size == (64, 64)
    assert [cut.getpixel((x, 32)) for x in (4, 60)] == colours[1:3]
    assert [added.getpixel((x, y)) for x in (4, 60) for y in (4, 32, 60)] == [colours[0]] * 3 + [colours[3]] * 3
    for field, value in (("resize_mode", 3), ("inpainting_fill", 2), ("inpainting_fill", 3)):
        with pytest.raises(RequestError, match="latents"):
            ImageToImage(**{"init_images": [sent], "mask": sent, field: value}).given()


@pytest.mark.parametrize(
    "more",
    [
        {"resize_mode": 2, "width": 64, "height": 64},
        {"resize_mode": 1, "width": 64, "height": 64},
        {"resize_mode": 1, "width": -8},
        {"resize_mode": 2, "width": 2**31},
        {"alwayson_scripts": {"refiner": {"args": [True, "a", "x"]}}},
    ],
)
def test_odd_values_are_no_fault_of_the_server(more: dict[str, Any], http: httpx.Client) -> None:
    held = io.BytesIO()
    PILImage.new("RGB", (1000, 1)).save(held, "PNG")
    body = {"init_images": [base64.b64encode(held.getvalue()).decode()], "steps": 1, "prompt": "x", **more}
    options = {"override_settings": {"sd_model_checkpoint": "starter-noto"}}
    assert http.post("/sdapi/v1/img2img", json=body | options).status_code in (200, 422)
