"""A soak's verdict on memory: no false alarms, and no leak of a megabyte in ten images is missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import checkpoints
from support.scale import thinned

import safelight
from safelight.diagnostics import soak
from safelight.diagnostics.soak import SoakResult
from safelight.errors import InputError
from safelight.workers.local_engine import LocalEngine

KINDS = 12
RUNS = 100


def series(count: int, seed: int, leak: float = 0.0, noise: float = 0.05, wild: str = "") -> SoakResult:
    """A soak of ``count`` images after everything was made twice: levels by kind, a breath that lasts, and ``leak``
    megabytes an image; ``wild``: what a busy machine or a library adds."""
    chance = np.random.default_rng(seed)
    kinds = chance.integers(0, KINDS, count)
    values = 430 + chance.normal(0, noise * 4, KINDS)[kinds] + chance.normal(0, noise, count)
    for n in range(1, count):
        values[n] += 0.7 * (values[n - 1] - values[n]) * (chance.random() < 0.5)
    at = np.arange(count)
    if wild == "steps":
        for _ in range(2):
            values += chance.uniform(-8, 8) * (at > chance.integers(0, count))
    elif wild == "spikes":
        values += 40 * (chance.random(count) < 0.1)
    elif wild == "fills":
        values += 10 * (1 - np.exp(-at / (count / 6)))
    elif wild == "breathes":
        values += 3 * np.sin(at / count * 2 * np.pi * chance.uniform(1, 5) + chance.uniform(0, 6))
    values += leak * at
    return SoakResult([f"kind {n}" for n in kinds], [0.01] * count, list(values), [], 0)


@pytest.mark.parametrize("wild", ["", "steps", "spikes", "fills", "breathes"])
@pytest.mark.parametrize("count", thinned([60, 1, 24, 36, 200, 600], 4))
@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_no_false_alarm_in_a_hundred_runs(count: int, wild: str, noise: float) -> None:
    found = [series(count, seed, 0, noise, wild).findings()[1] for seed in range(RUNS)]
    assert [finding.evidence for finding in found if not finding.ok] == []


@pytest.mark.parametrize(
    ("count", "noise", "wild"),
    [(36, 0.02, ""), (60, 0.1, ""), (200, 0.5, ""), (600, 3.0, ""), (200, 0.5, "spikes"), (600, 0.5, "steps")],
)
def test_a_megabyte_in_ten_images_is_found(count: int, noise: float, wild: str) -> None:
    """What is not sure is said to be unsure."""
    found = [series(count, seed, 0.1, noise, wild).findings()[1] for seed in range(RUNS)]
    missed = [finding.evidence for finding in found if finding.ok]
    assert len(missed) <= 2
    assert all("too short to tell" in evidence for evidence in missed)


def test_a_megabyte_at_once_at_every_tenth_image_is_found() -> None:
    soaked = series(100, 1)
    soaked.megabytes = [value + n // 10 for n, value in enumerate(soaked.megabytes)]
    assert not soaked.findings()[1].ok


def test_too_short_says_so() -> None:
    soaked = series(30, 1)
    soaked.settled = 24
    finding = soaked.findings()[1]
    assert finding.ok
    assert "too short to tell; it needs 60 images" in finding.evidence
    assert "too short to tell" in series(40, 1, 0.1, 8.0).findings()[1].evidence


@pytest.mark.parametrize("leaks", thinned([True, False]))
def test_of_an_engine(root: Path, tmp_path: Path, leaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "MAX_SIDE", 64)
    engine = safelight.open_engine(root)
    for seed in (1, 2):
        engine.library.add(checkpoints.write_single(tmp_path / f"{seed}.safetensors", "sd1", seed), f"m{seed}")
    models = [engine.library.get(name) for name in ("m1", "m2")]
    kept: list[bytes] = []
    soaked = soak.soak(engine, models, lambda count, _: count >= 44, lambda _: kept.append(b"x" * (10**5 * leaks)))
    assert soaked.settled == 4
    assert all(one != other for one, other in zip(soaked.models, soaked.models[1:], strict=False))
    finding = soaked.findings()[1]
    assert finding.ok == (not leaks), finding


def test_models_that_need_an_image_are_left_out_and_named(engine: LocalEngine, tiny: Path) -> None:
    refiner = engine.library.find(str(tiny / "refiner.safetensors"))
    soaked = soak.soak(engine, [engine.library.get("starter-noto"), refiner], lambda count, _: count >= 1)
    assert "(without refiner, which need an image)" in soaked.findings()[0].evidence
    with pytest.raises(InputError, match="no model draws from text alone: refiner"):
        soak.soak(engine, [refiner], lambda count, _: count >= 1)
