"""Adapters over HTTP and on the command line: the same images, by whatever way they are asked for."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support import adapters
from support.serving import Server, ended
from typer.testing import CliRunner

from safelight.catalog import starters
from safelight.catalog.adapters import Adapters
from safelight.cli.main import app

BODY: dict[str, Any] = {"model": "starter-noto", "seed": 4, "steps": 2, "width": 64, "height": 64}


@pytest.fixture
def style(server: Server) -> str:
    """The name of an adapter for the starters."""
    known = {adapter.name for adapter in Adapters(server.root).all()}
    if "style" not in known:
        Adapters(server.root).add(adapters.for_starter(server.root / "style.safetensors"))
    return "style"


def pixels(http: httpx.Client, **body: Any) -> str:
    answer = http.post("/api/v1/generate", json={**BODY, **body})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    assert ended(http, job)["state"] == "done"
    return http.get(f"/api/v1/jobs/{job}/images").json()[0]["pixels_sha256"]


def test_every_way_to_ask_gives_the_same_image(http: httpx.Client, server: Server, style: str, tmp_path: Path) -> None:
    plain = pixels(http, prompt="red apple")
    right = pixels(http, prompt="red apple", loras=[{"name": style, "strength": 0.7}])
    assert right != plain
    assert pixels(http, prompt=f"red apple <lora:{style}:0.7>") == right
    assert pixels(http, prompt="red apple") == plain
    body = {"prompt": f"red apple <lora:{style}:0.7>", "seed": 4, "steps": 2, "width": 64, "height": 64}
    body |= {"sampler_name": "Euler", "override_settings": {"sd_model_checkpoint": "starter-noto"}}
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))) as image:
        assert hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() == right
        text = image.info["parameters"]
    assert text.startswith(f"red apple <lora:{style}:0.7>\n")
    assert f'Lora hashes: "{style}: ' in text
    flags = ["generate", "red apple", "-m", "starter-noto", "--seed", "4", "--steps", "2", "--width", "64"]
    flags += ["--height", "64", "--lora", f"{style}:0.7", "--out", str(tmp_path), "--json"]
    for more in (["--root", str(server.root)], ["--server", server.url]):
        made = CliRunner().invoke(app, [*flags, *more])
        assert made.exit_code == 0, made.output
        assert json.loads(made.stdout)["pixels_sha256"] == right
    again = CliRunner().invoke(app, ["remake", json.loads(made.stdout)["path"], "--root", str(server.root)])
    assert again.exit_code == 0, again.output
    assert "the same, pixel for pixel" in again.output


def test_a_server_takes_names_only(http: httpx.Client, server: Server, style: str) -> None:
    listed = http.get("/api/v1/adapters").json()
    names = [style, *(adapter.name for adapter in starters.adapters())]
    assert [adapter["name"] for adapter in listed] == names
    loras = [adapter["name"] for adapter in listed if adapter["kind"] == "lora"]
    assert [adapter["name"] for adapter in http.get("/sdapi/v1/loras").json()] == loras
    for lora in (str(server.root / "style.safetensors"), "nobody"):
        answer = http.post("/api/v1/generate", json={**BODY, "prompt": "x", "loras": [{"name": lora}]})
        assert answer.status_code == 404, answer.text
    pinned = [{"name": "/etc/hostname", "digest": "0" * 64}]
    answer = http.post("/api/v1/generate", json={**BODY, "prompt": "x", "loras": pinned})
    assert (answer.status_code, "no adapter has the content" in answer.text) == (409, True), answer.text
    answer = http.post("/api/v1/generate", json={**BODY, "prompt": "x", "loras": [{"name": style, "strength": 1000}]})
    assert answer.status_code == 422


def test_the_command_line_adds_lists_verifies_and_removes(root: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        made = CliRunner().invoke(app, ["adapters", *arguments, "--root", str(root)])
        return made.exit_code, made.output

    path = adapters.write(tmp_path / "my style.safetensors")
    assert "my style" not in run("list")[1]
    assert run("add", str(path)) == (0, "added my style: lora for sd1\n")
    assert "my style" in run("list")[1]
    assert run("verify", "my style") == (0, "my style: intact\n")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, said = run("verify", "my style")
    assert (code, "its content changed" in said) == (1, True)
    assert run("remove", "my style")[0] == 0
    assert run("remove", "my style")[0] != 0
