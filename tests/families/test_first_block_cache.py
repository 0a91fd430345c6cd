"""First-block caching: diffusers' pixels where it has it, nothing left over for the next image, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TinyFamily, tiny_families
from support.scale import thinned
from torch import nn

import safelight
from safelight.errors import RequestError
from safelight.families.features import Feature
from safelight.memory.planner import Planner
from safelight.pipeline.first_block_cache import FirstBlockCache
from safelight.workers.local_engine import LocalEngine

SEED = 5
STEPS = 8
FLUX, QWEN = 0.35, 0.6
"""Thresholds that cut some steps short, and not others."""
LARGER = 2.0
"""Random weights do very different things in each step. So thresholds are multiplied by this."""

if not {"flux", "qwen-image"} <= set(tiny_families()):
    pytest.skip("the installed libraries lack these models", allow_module_level=True)

from diffusers.hooks import FirstBlockCacheConfig  # noqa: E402
from support import flux, qwen_image  # noqa: E402

TRANSFORMERS = [
    label for label, one in tiny_families().items() if Feature.FIRST_BLOCK_CACHE in one.family.features_of(one.variant)
]


def request(path: Path, threshold: float, **changes: Any) -> safelight.Request:
    values = {"steps": STEPS, "width": 64, "height": 48, "seed": 11, "first_block_cache": threshold, **changes}
    return safelight.Request("a red apple", str(path), **values)


@pytest.fixture(autouse=True)
def larger_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(FirstBlockCache):
        def __init__(self, denoiser: nn.Module, threshold: float) -> None:
            super().__init__(denoiser, LARGER * threshold)

    monkeypatch.setattr("safelight.pipeline.denoise.FirstBlockCache", Larger)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.write_folder(tmp_path_factory.mktemp("cache") / "flux", SEED, "dev")


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.write_folder(tmp_path_factory.mktemp("cache") / "qwen", SEED)


def theirs(pipe: Any, threshold: float, **call: Any) -> bytes:
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    if threshold:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(LARGER * threshold))
    call = {"num_inference_steps": STEPS, "width": 64, "height": 48, **call}
    return pipe("a red apple", generator=torch.Generator("cpu").manual_seed(11), **call).images[0].tobytes()


def test_pixels_of_flux_are_those_of_diffusers(flux_folder: Path, shared_engine: LocalEngine) -> None:
    drawn: set[bytes] = set()
    for threshold in (0.0, 0.1, FLUX):
        right = theirs(flux.pipeline(SEED, "dev"), threshold, guidance_scale=3.5, max_sequence_length=512)
        image = next(shared_engine.generate(request(flux_folder, threshold)))
        assert image.pixels == right, threshold
        drawn.add(right)
    assert 0 < image.metadata["skipped_calls"] < STEPS - 1
    assert len(drawn) >= 2


def test_each_row_of_qwen_image_has_its_own_cache_as_in_diffusers(
    qwen_folder: Path, shared_engine: LocalEngine
) -> None:
    asked: dict[str, Any] = {"cfg": 3.0, "negative": "green pears"}
    right = theirs(qwen_image.pipeline(SEED), QWEN, true_cfg_scale=3.0, negative_prompt="green pears")
    image = next(shared_engine.generate(request(qwen_folder, QWEN, **asked)))
    assert image.pixels == right
    assert 0 < image.metadata["skipped_calls"] < 2 * (STEPS - 1)
    assert next(shared_engine.generate(request(qwen_folder, 0.0, **asked))).pixels != right


@pytest.fixture(params=thinned(TRANSFORMERS, 3))
def tiny_family(request: pytest.FixtureRequest) -> TinyFamily:
    return tiny_families()[request.param]


def test_nothing_is_left_for_the_next_image(
    tiny_family: TinyFamily, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With, without, with; below the smallest threshold; streamed."""
    tiny_family.make_references_small(monkeypatch)
    folder = tiny_family.write_folder(tmp_path / "folder", SEED)
    engine = safelight.open_engine(root)
    engine.library.add(folder, "tiny", variant=tiny_family.variant)
    plain = tiny_family.ask("tiny", steps=6)
    cached = tiny_family.ask("tiny", steps=6, first_block_cache=1.0)

    def drawn(one: safelight.Request, where: LocalEngine = engine) -> tuple[str, object]:
        image = next(where.generate(one))
        return image.pixels_sha256, image.metadata.get("skipped_calls")

    first, without = drawn(cached), drawn(plain)
    assert first[1]
    assert without[1] is None
    assert first[0] != without[0]
    assert drawn(cached) == first
    assert drawn(plain) == without
    # No step is cut short below the smallest threshold.
    assert drawn(tiny_family.ask("tiny", steps=6, first_block_cache=1e-9)) == (without[0], 0)
    model = engine.library.find("tiny")
    planner: Planner = engine.resources.residency.planner
    least = max(planner.min_weight_bytes(part, torch.float32) for part in model.manifest.components) / 2**30
    engine.close()
    assert drawn(cached, safelight.open_engine(root, max_cache_ram_gb=least)) == first


def test_images_of_a_batch_are_those_of_single_requests(flux_folder: Path, shared_engine: LocalEngine) -> None:
    both = list(shared_engine.generate(request(flux_folder, FLUX, count=2)))
    alone = [next(shared_engine.generate(request(flux_folder, FLUX, seed=11 + n))) for n in range(2)]
    assert [one.pixels_sha256 for one in both] == [one.pixels_sha256 for one in alone]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_an_error_the_blocks_are_as_before(
    error: type[BaseException], flux_folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = safelight.open_engine(root)
    right = next(engine.generate(request(flux_folder, 0.0))).pixels_sha256
    with monkeypatch.context() as patch:
        patch.setattr("safelight.pipeline.first_block_cache.FirstBlockCache._is_close", raising(error))
        with pytest.raises(error):
            next(engine.generate(request(flux_folder, FLUX)))
    assert next(engine.generate(request(flux_folder, 0.0))).pixels_sha256 == right


def raising(error: type[BaseException]) -> Callable[..., bool]:
    def raise_it(*_: object) -> bool:
        raise error

    return raise_it


def test_what_cannot_have_it_says_so(flux_folder: Path, tiny: Path, shared_engine: LocalEngine) -> None:
    with pytest.raises(RequestError, match=r"first-block caching, which .* does not have"):
        next(shared_engine.generate(request(tiny / "a.safetensors", 0.1)))
    with pytest.raises(RequestError, match="cannot be combined with ControlNets"):
        request(flux_folder, 0.1, controls=[{"name": "edges", "image": "x.png"}])
