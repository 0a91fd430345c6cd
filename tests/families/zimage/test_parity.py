"""Z-Image's pixels equal those of diffusers' pipelines, bit for bit, on a CPU in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zimage

import safelight
from safelight.workers.local_engine import LocalEngine

SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage.write_folder(tmp_path_factory.mktemp("zimage") / "tiny", SEED)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zimage.pipeline(SEED)


def theirs(pipe: Any, guidance_scale: float = 0.0, negative: str = "", steps: int = 3, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red apple (fresh)",
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(11),
        **{"width": 64, "height": 48, **call},
    ).images[0]
    return image.tobytes()


def ours(engine: LocalEngine, path: Path, **changes: Any) -> bytes:
    values = {"prompt": "a red apple (fresh)", "steps": 3, "width": 64, "height": 48, "seed": 11, **changes}
    return next(engine.generate(safelight.Request(model=str(path), **values))).pixels


def test_text_to_image(shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder) == theirs(pipe)


@pytest.mark.parametrize("negative", ["", "a blurred picture of many green pears"])
def test_classifier_free_guidance(negative: str, shared_engine: LocalEngine, folder: Path, pipe: Any) -> None:
    assert ours(shared_engine, folder, cfg=3.5, negative=negative) == theirs(pipe, 2.5, negative)
