"""Other people's programs read the generation data in Safelight's pictures: sd-prompt-reader and sd-geninfo.

sd-parsers is in ``tests/pictures/test_generation_data.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import safelight

pytestmark = pytest.mark.full

PACKAGES = ("sd-prompt-reader==1.3.5", "sd-geninfo==0.0.3", "piexif==1.1.3", "imageio==2.38.0")
"""They are installed apart: sd-prompt-reader wants an old Pillow, and packages of its window."""

PROMPT_READER = """
import json, sys
from sd_prompt_reader.image_data_reader import ImageDataReader

for path in sys.argv[1:]:
    found = ImageDataReader(path)
    told = {**found.parameter, "positive": found.positive, "negative": found.negative}
    print(json.dumps({**told, "status": found.status.name, "tool": found.tool}))
"""

GENINFO = """
import json, sys
from PIL import Image
from sd_geninfo.sd_geninfo import parse_geninfo, read_geninfo, yaml_to_json

for path in sys.argv[1:]:
    text, _ = read_geninfo(Image.open(path))
    print(json.dumps(json.loads(yaml_to_json(parse_geninfo(text)))))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("readers")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *PACKAGES]
    subprocess.run(command, check=True)
    return target


@pytest.fixture
def pictures(shared_engine: Any, tmp_path: Path) -> list[Path]:
    request = safelight.Request(
        "a red apple, (fresh:1.2)",
        "starter-noto",
        negative="blurred",
        seed=42,
        steps=2,
        cfg=6.5,
        width=64,
        height=96,
        sampler="dpmpp_2m",
        schedule="karras",
    )
    image = next(shared_engine.generate(request))
    return [safelight.save(image, tmp_path, form) for form in ("png", "jpeg", "webp")]


@pytest.fixture
def run(installed: Path) -> Callable[..., list[dict[str, Any]]]:
    def call(program: str, paths: list[Path]) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", program, *map(str, paths)]
        env = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return call


def test_sd_prompt_reader(run: Callable[..., list[dict[str, Any]]], pictures: list[Path]) -> None:
    found = run(PROMPT_READER, pictures)
    assert len(found) == 3
    for row in found:
        assert (row["status"], row["tool"]) == ("READ_SUCCESS", "A1111 webUI")
        assert (row["positive"], row["negative"]) == ("a red apple, (fresh:1.2)", "blurred")
        assert (row["model"], row["sampler"], row["seed"]) == ("starter-noto", "DPM++ 2M", "42")
        assert (row["cfg"], row["steps"], row["size"]) == ("6.5", "2", "64x96")


def test_sd_geninfo(run: Callable[..., list[dict[str, Any]]], pictures: list[Path]) -> None:
    found = run(GENINFO, pictures)
    assert len(found) == 3
    for row in found:
        assert (row["Positive prompt"], row["Negative prompt"]) == ("a red apple, (fresh:1.2)", "blurred")
        assert (row["Seed"], row["Steps"], row["CFG scale"], row["Sampler"]) == (42, 2, 6.5, "DPM++ 2M")
        assert (row["Model"], row["Size"]) == ("starter-noto", "64x96")
