"""Random jobs with checkpoints, adapters, VAEs, pictures, prompts and settings. The tests compare each with the same
job in a process that has made nothing else.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from support import adapters, controls, forking

import safelight
from safelight.errors import OutOfMemoryError
from safelight.request.adapters import Control, Lora
from safelight.request.schema import Request

PROMPTS = (
    "red apple",
    "a (red:1.3) apple",
    "blue [house] BREAK lake",
    "",
    "[red:blue:0.5] house",
    "[cow|horse] in a field",
)
WORDS = {"sd1": "a thing in snow", "sdxl": "a thing for two"}


@dataclass(frozen=True)
class Files:
    """The files that jobs use. ``checkpoints``, ``loras`` and ``nets`` (ControlNets) are by base."""

    checkpoints: dict[str, list[Path]]
    loras: dict[str, list[Path]]
    nets: dict[str, Path]
    folder: Path
    root: Path

    @classmethod
    def make(cls, tiny: Path, folder: Path, root: Path) -> Files:
        """Write the files into ``folder``, and add textual inversions to the library under ``root``."""
        loras = {
            "sd1": [adapters.write(folder / f"one{n}.safetensors", "sd1", n) for n in (1, 2, 3)],
            "sdxl": [adapters.write(folder / f"xl{n}.safetensors", "sdxl", n, adapters.kohya_two) for n in (1, 2)],
        }
        nets = {base: controls.write(folder / f"net-{base}.safetensors", base) for base in ("sd1", "sdxl")}
        controls.picture(folder / "picture.png")
        controls.picture(folder / "edges.png", 10)
        mask = PILImage.new("L", (64, 64), 0)
        mask.paste(255, (8, 8, 40, 40))
        mask.save(folder / "mask.png")
        known = safelight.open_engine(root).catalog.adapters
        known.add(controls.inversion(folder / "snow.safetensors"), "thing-sd1")
        known.add(controls.inversion(folder / "two.safetensors", 1, "sdxl"), "thing-sdxl")
        names = {"sd1": ("a", "b"), "sdxl": ("xl",)}
        checkpoints = {base: [tiny / f"{name}.safetensors" for name in each] for base, each in names.items()}
        return cls(checkpoints, loras, nets, folder, root)


def job(chance: random.Random, files: Files) -> Request:
    """A random valid job."""
    base = chance.choice(("sd1", "sd1", "sdxl"))
    of = files.checkpoints[base]
    strengths = (-0.5, 0.3, 1.0)
    chosen = chance.sample(files.loras[base], chance.randint(0, 2))
    more: dict[str, Any] = {"width": 64, "height": 64}
    start = chance.random()
    if start < 0.3:
        more["image"] = str(files.folder / "picture.png")
        if start < 0.1:
            more["mask"] = str(files.folder / "mask.png")
        elif start < 0.15:
            more |= {"outpaint": (16, 0, 0, 8), "width": 80, "height": 72}
    elif start < 0.45:
        more |= {"hires_scale": 1.5, "hires_upscaler": chance.choice(("latent", "lanczos")), "hires_strength": 0.5}
    if chance.random() < 0.25:
        picture = str(files.folder / "edges.png")
        how = {"weight": chance.choice((0.5, 1.0)), "mode": chance.choice(("balanced", "more_control"))}
        net = Control(str(files.nets[base]), picture, **how, preprocessor=chance.choice(("none", "canny")))  # type: ignore[arg-type]
        more["controls"] = (net,)
    if chance.random() < 0.2:
        more["vae"] = str(chance.choice(of))
    if chance.random() < 0.15:
        more["text_encoder"] = str(chance.choice(of))
    if chance.random() < 0.15:
        more |= {"variation_seed": 5, "variation_strength": 0.3}
    if chance.random() < 0.15:
        more["seamless"] = chance.choice(("x", "xy"))
    if chance.random() < 0.1 and "seamless" not in more:
        more["tile"] = 64
    prompt = chance.choice(PROMPTS) if chance.random() < 0.8 else f"a thing-{base} in snow"
    return Request(
        prompt,
        str(chance.choice(of)),
        chance.choice(("", "dark")),
        seed=chance.randint(0, 3),
        steps=chance.randint(2, 3),
        **more,
        sampler=chance.choice(("euler", "euler_a", "dpmpp_2m")),
        loras=tuple(Lora(str(path), chance.choice(strengths)) for path in chosen),
        clip_skip=chance.randint(0, 1),
    )


SERVE = """
import json, os, sys
import safelight, safelight.assembly.engine
from safelight.request.schema import Request
for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        engine = safelight.open_engine(sys.argv[1])
        made = next(engine.generate(Request(**json.loads(line)))).pixels_sha256
        os.write(writer, made.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        print(told.read(), flush=True)
"""


class Forks:
    """Makes each job in a fork of a process that has only imported the packages."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-c", SERVE, str(root)]
        self._process = forking.started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def made(self, request: Request) -> str:
        """Make the image. Returns the SHA-256 of its pixels."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        found = self._process.stdout.readline().strip()
        assert len(found) == 64, (found, request)
        return found

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def forks(root: Path) -> Generator[Forks]:
    made = Forks(root)
    try:
        yield made
    finally:
        made.close()


FRESH = """
import json, sys
import safelight
from safelight.request.schema import Request
print(next(safelight.open_engine(sys.argv[1]).generate(Request(**json.loads(sys.argv[2])))).pixels_sha256)
"""


def fresh(root: Path, request: Request) -> str:
    """Make the image in a new process. Returns the SHA-256 of its pixels."""
    command = [sys.executable, "-c", FRESH, str(root), json.dumps(asdict(request))]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout.strip()


class Least:
    """An engine whose memory for weights is the least with which every job so far was possible."""

    def __init__(self, root: Path, gigabytes: float = 0.001) -> None:
        self.root, self.gigabytes = root, gigabytes
        self._engine = safelight.open_engine(root, max_cache_ram_gb=gigabytes)

    def made(self, request: Request) -> str:
        while True:
            try:
                return next(self._engine.generate(request)).pixels_sha256
            except OutOfMemoryError as error:
                told = str(error)
            found = re.search(r"; at least ([0-9.]+)", told)
            assert found is not None, told
            least = float(found[1])
            assert least > self.gigabytes
            self.gigabytes = least
            self._engine = safelight.open_engine(self.root, max_cache_ram_gb=least)


def shuffled(chance: random.Random, request: Request) -> Request:
    """The same request with its adapters in another order."""
    return replace(request, loras=tuple(chance.sample(request.loras, len(request.loras))))
