"""Predictions of how long switches and images take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safelight.queue.timings import Known, Timings, denoiser_work
from safelight.request.results import Seconds
from safelight.request.schema import Request

REQUEST = Request("", "noto", steps=10, cfg=7.0)
SMALL = Known("a" * 64, "sd1", "text-to-image", 2_000_000_000)
OTHER = Known("b" * 64, "sd1", "text-to-image", 2_000_000_000)
LARGE = Known("c" * 64, "sdxl", "text-to-image", 6_000_000_000)
MODELS = [SMALL, OTHER, LARGE]
MEGAPIXEL = 1_000_000


def measured(path: Path) -> Timings:
    timings = Timings(path)
    timings.add(SMALL.digest, REQUEST, MEGAPIXEL, Seconds(switch=1.0, encode=0.5, denoise=20.0, decode=1.5))
    return timings


def test_nothing_is_said_before_the_first_image(tmp_path: Path) -> None:
    found = Timings(tmp_path / "timings.json").predict(SMALL, MODELS, REQUEST, MEGAPIXEL, False)
    assert (found.switch, found.image, found.basis) == (None, None, "")


def test_an_image_is_predicted_from_another_one(tmp_path: Path) -> None:
    timings = measured(tmp_path / "timings.json")
    same = timings.predict(SMALL, MODELS, REQUEST, MEGAPIXEL, True)
    assert (same.switch, same.image, same.basis) == (0.0, pytest.approx(22.0), "this model")
    # Twice the steps on half of the pixels: as much work for the denoiser, half of the rest.
    half = timings.predict(SMALL, MODELS, replace(REQUEST, steps=20), MEGAPIXEL // 2, False)
    assert (half.switch, half.image) == (1.0, pytest.approx(21.0))
    # Without guidance, a step has one call.
    assert timings.predict(SMALL, MODELS, replace(REQUEST, cfg=1.0), MEGAPIXEL, True).image == pytest.approx(12.0)


def test_other_models_are_predicted_by_base_and_by_size(tmp_path: Path) -> None:
    timings = measured(tmp_path / "timings.json")
    sibling = timings.predict(OTHER, MODELS, REQUEST, MEGAPIXEL, False)
    assert (sibling.switch, sibling.image, sibling.basis) == (1.0, pytest.approx(22.0), "models of its base")
    large = timings.predict(LARGE, MODELS, REQUEST, MEGAPIXEL, False)
    assert (large.switch, large.image, large.basis) == (3.0, pytest.approx(62.0), "other models")
    assert timings.switch_seconds(MODELS) == [1.0, 1.0, 3.0]


def test_an_image_without_a_switch_leaves_the_time_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelight.queue.timings.WRITE_SECONDS", 0.0)
    timings = measured(tmp_path / "timings.json")
    timings.add(SMALL.digest, REQUEST, MEGAPIXEL, Seconds(switch=0.0, encode=0.5, denoise=40.0, decode=1.5))
    again = Timings(tmp_path / "timings.json")
    for one in (timings, again):
        found = one.predict(SMALL, MODELS, REQUEST, MEGAPIXEL, False)
        assert (found.switch, found.image) == (1.0, pytest.approx(32.0))


def test_the_file_is_not_written_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timings.json"
    timings = measured(path)
    before = path.stat()
    for _ in range(3):
        timings.add(SMALL.digest, REQUEST, MEGAPIXEL, Seconds(switch=0.0, encode=0.5, denoise=40.0, decode=1.5))
    assert path.stat() == before
    # What was not written then is written later, although it does not change any more.
    monkeypatch.setattr("safelight.queue.timings.WRITE_SECONDS", 0.0)
    timings.add(SMALL.digest, REQUEST, MEGAPIXEL, Seconds(switch=0.0, encode=0.5, denoise=37.5, decode=1.5))
    assert Timings(path).predict(SMALL, MODELS, REQUEST, MEGAPIXEL, True).image == pytest.approx(39.5)
    # A new model is written at once, with what is known of the others.
    timings.add(LARGE.digest, REQUEST, MEGAPIXEL, Seconds(switch=0.0, encode=0.5, denoise=40.0, decode=1.5))
    assert Timings(path).predict(SMALL, MODELS, REQUEST, MEGAPIXEL, True).image == pytest.approx(39.5)


def test_the_second_pass_is_work_too() -> None:
    plain = denoiser_work(REQUEST, MEGAPIXEL)
    hires = denoiser_work(replace(REQUEST, hires_scale=2.0, hires_strength=0.5, hires_steps=10), MEGAPIXEL)
    assert (plain, hires) == (20.0, 20.0 + 2 * 4 * 5.0)
    assert denoiser_work(replace(REQUEST, image="a" * 64, strength=0.5), MEGAPIXEL) == 10.0


def test_a_damaged_file_costs_only_predictions(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    measured(path)
    path.write_text('{"models": {"a": {"denoise": "x"}}}')
    assert Timings(path).switch_seconds(MODELS) == [None, None, None]
