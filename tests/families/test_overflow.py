"""Denoisers whose values exceed what fp16 holds compute in fp32 where the others compute in fp16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import TinyFamily, tiny_families
from support.scale import thinned

import safelight
from safelight.families.family import CONTROLNET, Family
from safelight.pipeline import model_stages
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.pipeline.resources import dtype_of

SEED = 5
GROWN = 3e4
FEED_FORWARD = {
    "z-image": r"layers\.0\.feed_forward\.w3\.",
    "qwen-image": r"transformer_blocks\.0\.img_mlp\.net\.0\.",
    "anima": r"transformer_blocks\.0\.ff\.net\.0\.proj\.",
}
"""The matrices of published checkpoints whose results exceed 65,504."""


def overflowing(family: Family) -> bool:
    return family.component(family.denoiser).overflows_in_fp16


def write(tiny: TinyFamily, folder: Path) -> Path:
    """Write a checkpoint whose transformer has values above 65,504."""
    tiny.write_folder(folder, SEED)
    [path] = (folder / tiny.family.denoiser).glob("*.safetensors")
    tensors = load_file(path)
    grown = [name for name in tensors if re.match(FEED_FORWARD[tiny.name], name)]
    assert grown
    save_file({name: tensor * GROWN if name in grown else tensor for name, tensor in tensors.items()}, path)
    return folder


@pytest.mark.parametrize("name", thinned([name for name in FEED_FORWARD if name in tiny_families()]))
def test_in_fp16_the_denoiser_computes_in_fp32(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, computed_in = tiny_families()[name], set[torch.dtype]()
    denoise = model_stages.denoise

    def seen(work: DenoiseInputs) -> Denoised:
        computed_in.update(parameter.dtype for parameter in work.denoiser.parameters())
        return denoise(work)

    monkeypatch.setattr(model_stages, "denoise", seen)
    engine = safelight.open_engine(root)
    engine.library.add(write(tiny, tmp_path / "folder"), name, variant=tiny.variant)
    image = next(engine.generate(tiny.ask(name, precision="fp16")))
    assert image.metadata["repairs"] == []
    assert computed_in == {torch.float32}
    assert image.metadata["run"]["dtype"] == "fp16"
    settings = engine.resources_for(engine.library.get(name), "fp16").run_settings
    assert dtype_of(settings, tiny.family, CONTROLNET) == torch.float32
    assert dtype_of(settings, tiny_families()["flux"].family, CONTROLNET) == torch.float16


def test_those_that_overflow_are_named() -> None:
    tiny = {one.family.name: one.family for one in tiny_families().values()}
    assert {name for name, family in tiny.items() if overflowing(family)} == FEED_FORWARD.keys() & tiny.keys()
