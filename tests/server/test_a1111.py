"""Which model a title means, whose options count, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from safelight.errors import ModelNotFoundError
from safelight.library.library import Library
from safelight.server.apis.a1111 import by_title
from safelight.server.clients import CLIENTS, Client, Clients
from safelight.server.problems import RefusedError


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
        ("refiner_checkpoint", {"refiner_checkpoint": "xl-refiner"}),
        ("enable_hr", {"enable_hr": True}),
        ("init_images", {"init_images": ["iVBORw0KGgo="]}),
        ("eta", {"eta": 0.5}),
        ("tiling", {"tiling": True}),
        ("some_new_field", {"some_new_field": "x"}),
        ("override_settings.sd_vae", {"override_settings": {"sd_vae": "vae-ft-mse"}}),
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


def test_state_19_who_sets_nothing_takes_nobodys_place() -> None:
    clients = Clients()
    one = Client("connection 1", "127.0.0.1", named=False)
    clients.set(one, {"sd_model_checkpoint": "a"})
    for number in range(2, CLIENTS + 10):
        other = Client(f"connection {number}", "127.0.0.1", named=False)
        clients.set(other, {})
        assert clients.checkpoint(other) == "a"
    assert clients.checkpoint(one) == "a"
