"""The mission: whatever happens between two images, the same request gives the same pixels.

``make proof`` runs the long versions of these with the starters (``tools/proof.py``).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.jobs import small
from support.measured import give
from support.scale import times
from torch import nn

import safelight
from safelight.devices import host
from safelight.devices.cpu import CPU
from safelight.pipeline import model_stages
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.workers.local_engine import LocalEngine

NAMES = ("a.safetensors", "b.safetensors", "v2.safetensors", "xl.safetensors")


@pytest.fixture(scope="module")
def right(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each model's pixels in an engine that has held no other model."""
    root = tmp_path_factory.mktemp("root")
    give(root)
    found = {}
    for name in NAMES:
        engine = safelight.open_engine(root)
        found[name] = next(engine.generate(small(tiny / name))).pixels_sha256
        engine.close()
    return found


def test_state_02_any_order_gives_the_same(engine: LocalEngine, ask, right: dict[str, str]) -> None:
    chance = random.Random(0)
    for _ in range(times(8, 40)):
        name = chance.choice(NAMES)
        assert next(engine.generate(ask(name))).pixels_sha256 == right[name]


def test_state_02_with_room_for_one(root: Path, ask, right: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_MAX_CACHE_RAM_GB", "0.035")
    engine = safelight.open_engine(root)
    chance = random.Random(1)
    for _ in range(times(8, 30)):
        name = chance.choice(NAMES)
        assert next(engine.generate(ask(name))).pixels_sha256 == right[name]
        pool = engine.resources.residency.pool
        assert pool.used_bytes + pool.cached_bytes <= 0.035 * 2**30


def test_attention_03_with_fresh_memory_poisoned(engine: LocalEngine, ask, right: dict[str, str]) -> None:
    """Fresh memory is NaN: whoever reads what nobody wrote makes a black image."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for name in (*NAMES, *NAMES):
            assert next(engine.generate(ask(name))).pixels_sha256 == right[name]
    finally:
        torch.use_deterministic_algorithms(False)


def test_state_27_with_exceptions_thrown_inside_a_convolution(
    engine: LocalEngine, ask, right: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(2)
    original = nn.Conv2d.forward
    countdown = [0]

    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise RuntimeError("a kernel failed")
        return original(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    failures = 0
    kept = []
    for turn in range(times(18, 30)):
        name = chance.choice(NAMES)
        countdown[0] = chance.randint(1, 100) if turn % 3 == 0 else -1
        try:
            digest = next(engine.generate(ask(name))).pixels_sha256
        except RuntimeError as error:
            failures += 1
            kept.append(error)
        else:
            assert digest == right[name]
    assert failures > 3


def test_state_24_with_old_work_referenced_and_global_state_shaken(
    engine: LocalEngine, ask, right: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    original = model_stages.denoise

    def keeping(work: DenoiseInputs) -> Denoised:
        kept.append(work)
        return original(work)

    monkeypatch.setattr(model_stages, "denoise", keeping)
    chance = random.Random(3)
    for _ in range(times(10, 20)):
        torch.manual_seed(chance.randrange(1000))
        torch.rand(chance.randrange(100))
        random.seed(chance.randrange(1000))
        torch.set_num_threads(chance.choice([1, 2]))
        name = chance.choice(NAMES)
        assert next(engine.generate(ask(name))).pixels_sha256 == right[name]
    torch.set_num_threads(1)
    assert len(kept) == times(10, 20)


def test_attention_09_alignment_matters_and_is_kept(engine: LocalEngine, ask) -> None:
    """Every bound tensor starts at a multiple of 64 bytes, in both dtypes."""
    for precision in ("fp32", "bf16"):
        next(engine.generate(ask(precision=precision)))
    seen = 0
    for resident in engine.resources.residency.table.residents.values():
        for tensor in resident.buffer.tensors.values():
            seen += 1
            assert tensor.data_ptr() % 64 == 0
    assert seen > 300


def test_attention_09_broken_alignment_is_seen(engine: LocalEngine, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU, "allocate", lambda _, nbytes: host.allocate(nbytes + 4)[4:])
    with pytest.raises(safelight.BindingError, match="multiple of 64"):
        next(engine.generate(ask()))


def test_state_13_prompts_of_another_model_are_not_reused(engine: LocalEngine, ask, right: dict[str, str]) -> None:
    """The same prompt, another checkpoint, then another CLIP skip: each has its own conditioning."""
    skipped = next(engine.generate(ask("a.safetensors", clip_skip=1))).pixels_sha256
    assert next(engine.generate(ask("b.safetensors"))).pixels_sha256 == right["b.safetensors"]
    assert next(engine.generate(ask("a.safetensors"))).pixels_sha256 == right["a.safetensors"]
    assert skipped != right["a.safetensors"]


def test_state_17_the_image_names_the_model_that_made_it(engine: LocalEngine, ask) -> None:
    digests = {}
    for name in (*NAMES, *NAMES):
        image = next(engine.generate(ask(name)))
        assert image.metadata["model"]["digest"] == image.model_digest
        assert digests.setdefault(name, image.model_digest) == image.model_digest
    assert len(set(digests.values())) == len(NAMES)
