"""A model that is exported is the same model: here, and for diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from support.scale import thinned
from typer.testing import CliRunner

import safelight
from safelight.assembly.export import to_diffusers
from safelight.cli.main import app
from safelight.workers.local_engine import LocalEngine


@pytest.mark.parametrize(
    "name", thinned(["xl.safetensors", "old.ckpt", "folder", "a.safetensors", "v2.safetensors"], 1)
)
def test_every_base_comes_back_as_the_same_model(engine: LocalEngine, tiny: Path, tmp_path: Path, name: str) -> None:
    model = engine.library.add(tiny / name, "m")
    to_diffusers(model, tmp_path / "out")
    again = engine.library.add(tmp_path / "out", "again")
    assert (again.digest, again.base, again.prediction_type) == (model.digest, model.base, model.prediction_type)
    assert again.resolution == model.resolution
    with pytest.raises(safelight.InputError, match="already exists"):
        to_diffusers(model, tmp_path / "out")


@pytest.mark.full
def test_diffusers_draws_the_same_with_it(engine: LocalEngine, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["models", "export", "starter-noto", "--out", str(tmp_path / "noto")])
    assert result.exit_code == 0, result.output
    # It draws 64 pixels a side, which is not its base's size: the folder has to say so.
    assert engine.library.add(tmp_path / "noto", "noto").resolution == 64
    image = next(engine.generate(safelight.Request("red apple", "starter-noto", seed=3, steps=4)))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "noto", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "red apple",
        num_inference_steps=4,
        guidance_scale=7.0,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    ours = np.frombuffer(image.pixels, np.uint8).reshape(64, 64, 3).astype(float)
    assert np.abs(ours - theirs * 255).max() < 3
