"""Random jobs over checkpoints, adapters, VAEs, prompts and pictures, in one engine, in random order: each image is
that of an engine, and of a process, that has made nothing else. The seed is drawn anew each time, and printed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from support import adapters

import safelight
from safelight.types import Lora, Request

PROMPTS = ("red apple", "a (red:1.3) apple", "blue [house] BREAK lake", "")


def files(folder: Path) -> dict[str, list[Path]]:
    made = {
        "sd1": [adapters.write(folder / f"one{n}.safetensors", "sd1", n) for n in (1, 2, 3)],
        "sdxl": [adapters.write(folder / f"xl{n}.safetensors", "sdxl", n, adapters.kohya_two) for n in (1, 2)],
    }
    values = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    PILImage.fromarray(values).resize((64, 64)).save(folder / "picture.png")
    mask = PILImage.new("L", (64, 64), 0)
    mask.paste(255, (8, 8, 40, 40))
    mask.save(folder / "mask.png")
    return made


def kind(chance: random.Random, tiny: Path, folder: Path, known: dict[str, list[Path]]) -> Request:
    base, name = chance.choice((("sd1", "a"), ("sd1", "b"), ("sdxl", "xl")))
    chosen = chance.sample(known[base], chance.randint(0, 2))
    more: dict[str, Any] = {}
    if chance.random() < 0.3:
        more["image"] = str(folder / "picture.png")
        if chance.random() < 0.5:
            more["mask"] = str(folder / "mask.png")
    if base == "sd1" and chance.random() < 0.3:
        more["vae"] = str(tiny / chance.choice(("a.safetensors", "b.safetensors")))
    strengths = (-0.5, 0.3, 1.0)
    return Request(
        chance.choice(PROMPTS),
        str(tiny / f"{name}.safetensors"),
        seed=chance.randint(0, 3),
        steps=chance.randint(2, 3),
        width=64,
        height=64,
        sampler=chance.choice(("euler", "euler_a", "dpmpp_2m")),
        loras=tuple(Lora(str(path), chance.choice(strengths)) for path in chosen),
        clip_skip=chance.randint(0, 1),
        **more,
    )


def in_a_new_process(request: Request, root: Path) -> str:
    """What ``safelight generate`` prints."""
    flags = ["generate", request.prompt, "-m", request.model, "--seed", str(request.seed), "--steps"]
    flags += [str(request.steps), "--width", "64", "--height", "64", "--sampler", request.sampler, "--json"]
    flags += ["--clip-skip", str(request.clip_skip), "--out", str(root / "out")]
    for lora in request.loras:
        flags += ["--lora", f"{lora.name}:{lora.strength}"]
    for name in ("image", "mask", "vae"):
        flags += [f"--{name}", getattr(request, name)] if getattr(request, name) else []
    command = [sys.executable, "-m", "safelight.cli", "--root", str(root), *flags]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(made.stdout)["pixels_sha256"]


def tried(root: Path, tiny: Path, folder: Path, jobs: int, kinds: int, fresh: int) -> None:
    """``jobs`` of so many ``kinds``, as many as ``fresh`` of which are also made in a new process."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance, known = random.Random(seed), files(folder)
    wanted = [kind(chance, tiny, folder, known) for _ in range(kinds)]
    right = [next(safelight.open_engine(root).generate(request)).pixels_sha256 for request in wanted]
    for at in chance.sample(range(kinds), fresh):
        assert in_a_new_process(wanted[at], root) == right[at], wanted[at]
    # Room for about one model and what lies over it, so that things come and go.
    engine = safelight.open_engine(root, max_cache_ram_gb=0.06)
    for number in range(jobs):
        at = chance.randrange(kinds)
        # In another order adapters are the same.
        request = replace(wanted[at], loras=tuple(chance.sample(wanted[at].loras, len(wanted[at].loras))))
        assert next(engine.generate(request)).pixels_sha256 == right[at], (seed, number, request)


def test_every_job_is_that_of_a_fresh_process(root: Path, tiny: Path, tmp_path: Path) -> None:
    tried(root, tiny, tmp_path, jobs=100, kinds=8, fresh=1)


@pytest.mark.proof
def test_a_thousand_jobs_are_those_of_fresh_processes(root: Path, tiny: Path, tmp_path: Path) -> None:
    tried(root, tiny, tmp_path, jobs=1000, kinds=150, fresh=10)
