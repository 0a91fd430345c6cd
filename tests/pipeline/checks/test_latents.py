"""Finite, and within what the noise level allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.scale import thinned

import safelight
from safelight.boundary import schedulers
from safelight.errors import NotFiniteError
from safelight.pipeline import model_stages
from safelight.pipeline.checks import latents
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.request.samplers import SAMPLERS
from safelight.workers.local_engine import LocalEngine


@pytest.fixture
def engine(shared_engine: LocalEngine) -> LocalEngine:
    return shared_engine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_is_enough(value: float, dtype: torch.dtype) -> None:
    values = torch.randn(1, 4, 8, 8).to(dtype)
    assert latents.require_finite(values, "x", "fp32") < 10
    values[0, 3, 7, 7] = value
    with pytest.raises(NotFiniteError, match="the UNet computed NaN or infinity"):
        latents.require_finite(values, "the UNet", "fp32")


@pytest.mark.parametrize("sampler", thinned(sorted(SAMPLERS, key=lambda name: name != "dpmpp_sde"), 5))
def test_right_latents_are_within_at_every_step(engine: LocalEngine, ask, sampler: str) -> None:
    image = next(engine.generate(ask(sampler=sampler, steps=6, cfg=15.0)))
    assert not any("latents reached" in mark for mark in image.metadata["marks"])


def test_latents_that_grow_beyond_are_marked_and_not_failed(
    engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = model_stages.denoise

    def grown(work: DenoiseInputs) -> Denoised:
        return denoise(replace(work, on_call=lambda n, x: work.on_call(n, x * 1e4)))

    monkeypatch.setattr(model_stages, "denoise", grown)
    image = next(engine.generate(ask()))
    assert any("at step 1; at most" in mark for mark in image.metadata["marks"])
    assert any("the image may still be correct" in warning for warning in image.warnings)


def test_a_step_that_is_nan_is_the_last_one(engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    sigma = schedulers.sigma

    def spoiled(scheduler) -> float:
        steps.append(scheduler.step_index)
        return sigma(scheduler)

    monkeypatch.setattr(schedulers, "sigma", spoiled)
    monkeypatch.setattr(latents, "largest_magnitude", lambda _: float("nan") if len(steps) == 3 else 1.0)
    with pytest.raises(NotFiniteError, match="step 3"):
        next(engine.generate(ask(steps=8)))
    assert safelight.Request
