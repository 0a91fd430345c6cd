"""Clients that others wrote, from PyPI, make an image, an edit and a list of models: image-generation-mcp, sd-api-mcp,
Open WebUI. They are installed apart, because they need other versions of packages.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import checkpoints
from support.serving import Server, serving

pytestmark = pytest.mark.full

HERE = Path(__file__).parents[1]

IMAGE_GENERATION_MCP = """
import asyncio, base64, dataclasses, json, sys
from image_generation_mcp.providers import sd_webui
from image_generation_mcp.providers.openai import OpenAIImageProvider
from image_generation_mcp.providers.sd_webui import SdWebuiImageProvider
from image_generation_mcp.providers.types import InputImage

# Its presets have 768x768 pixels and 30 steps.
preset = sd_webui._resolve_preset
sd_webui._resolve_preset = lambda model: dataclasses.replace(preset(model), steps=2, sizes={"1:1": (64, 64)})

async def main():
    url, picture = sys.argv[1], base64.b64decode(sys.argv[2])
    webui = SdWebuiImageProvider(host=url)
    found = await webui.discover_capabilities()
    made = [await webui.generate("a cat", negative_prompt="bad", aspect_ratio="1:1")]
    made.append(await webui.generate("a dog", reference_images=[InputImage(picture)], strength=0.5))
    await webui.aclose()
    made.append(await OpenAIImageProvider(api_key="sk-test").generate("a cat", model="tiny"))
    images = [base64.b64encode(one.image_data).decode() for one in made]
    print(json.dumps({"models": [one.model_id for one in found.models], "images": images}))

asyncio.run(main())
"""

SD_API_MCP = """
import asyncio, json, sys
from sd_api_mcp.client import SDWebUIClient

async def main():
    client = SDWebUIClient(base_url=sys.argv[1], timeout=60, auth=None)
    models = await client.get_sd_models()
    await client.set_sd_model(models[0])
    small = {"prompt": "a cat", "negative_prompt": "", "steps": 2, "width": 64, "height": 64, "cfg_scale": 7.0}
    small |= {"sampler_name": "Euler a", "scheduler": "Automatic", "seed": -1, "n_iter": 1, "restore_faces": False}
    small |= {"tiling": False, "distilled_cfg_scale": 3.5}
    made = await client.txt2img(small)
    edit = {"init_images": ["data:image/png;base64," + sys.argv[2]], **small, "denoising_strength": 0.75}
    made += await client.img2img(edit)
    scale = {"resize_mode": 0, "show_extras_results": True, "gfpgan_visibility": 0, "codeformer_visibility": 0}
    scale |= {"codeformer_weight": 0, "upscaling_resize": 2.0, "upscaling_resize_w": 512, "upscaling_resize_h": 512}
    scale |= {"upscaling_crop": True, "upscaler_1": "Lanczos", "upscaler_2": "None", "extras_upscaler_2_visibility": 0}
    scale |= {"upscale_first": False, "imageList": [{"data": sys.argv[2], "name": "in.png"}]}
    made += await client.upscale_images(scale)
    print(json.dumps({"models": models, "images": made, "upscalers": await client.get_upscalers()}))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """A server with one tiny model: some of these clients ask for large images and many steps."""
    folder = tmp_path_factory.mktemp("clients")
    path = checkpoints.write_single(folder / "tiny.safetensors", "sd1", 1)
    (folder / "root").mkdir()
    (folder / "root/safelight.yaml").write_text("default_model: tiny\n")
    from safelight.catalog.defaults import set_defaults
    from safelight.catalog.library import Library

    library = Library(folder / "root")
    library.add(path, "tiny")
    # With one step, three quarters of the noise are no step at all.
    set_defaults(library, "tiny", {"steps": 2})
    with serving(folder / "root") as made:
        made.ready()
        yield made


@pytest.fixture(scope="module")
def picture() -> str:
    held = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Install packages apart, run a program with them, and return what it prints last."""

    def call(packages: list[str], program: list[str], **more: str) -> dict[str, Any]:
        target = tmp_path / "installed"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "--no-deps", *packages]
        if packages:
            # The newest of sd-api-mcp says that it needs a newer Python, which the part that is used here does not.
            subprocess.run([*command, "--ignore-requires-python"], check=True)
        env = {**os.environ, "PYTHONPATH": str(target), **more}
        done = subprocess.run([sys.executable, *program], check=True, stdout=subprocess.PIPE, text=True, env=env)
        return json.loads(done.stdout.splitlines()[-1])

    return call


def sizes(images: list[str]) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(base64.b64decode(one))).size for one in images]


def test_image_generation_mcp(run: Callable[..., dict[str, Any]], server: Server, picture: str) -> None:
    program = ["-c", IMAGE_GENERATION_MCP, server.url, picture]
    found = run(["image-generation-mcp==1.12.1"], program, OPENAI_BASE_URL=f"{server.url}/v1")
    assert any("tiny" in name for name in found["models"])
    assert sizes(found["images"]) == [(64, 64), (64, 64), (1024, 1024)]


def test_sd_api_mcp(run: Callable[..., dict[str, Any]], server: Server, picture: str) -> None:
    found = run(["sd-api-mcp==0.3.1"], ["-c", SD_API_MCP, server.url, picture])
    assert any(name.startswith("tiny") for name in found["models"])
    assert sizes(found["images"]) == [(64, 64), (64, 64), (128, 128)]
    assert "Lanczos" in found["upscalers"]


def test_open_webui(run: Callable[..., dict[str, Any]], server: Server, tmp_path: Path) -> None:
    """Its own image code. The package has 100 MB, of which one file is used."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--ignore-requires-python"]
    subprocess.run([*command, "-d", str(tmp_path), "open-webui==0.12.4"], check=True)
    [wheel] = tmp_path.glob("open_webui-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        images = opened.extract("open_webui/routers/images.py", tmp_path)
    wheel.unlink()
    program = [str(HERE / "data/foreign_clients/open_webui_images.py"), images, server.url, "tiny"]
    found = run(["aiofiles==25.1.0"], program)
    assert found["models"] >= 1
    assert sizes(found["images"]) == [(64, 64)] * 4
