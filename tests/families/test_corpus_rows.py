"""Rows of the corpus in which a family can matter, with families with rectified flow. Their tests are named after them.

The same rows with Stable Diffusion, and those in which a family cannot matter, are tested elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.families import TinyFamily, tiny_families
from support.jobs import small
from support.scale import thinned, times
from torch import nn

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices.simulated import simulated
from safelight.errors import OutOfMemoryError
from safelight.families.parts import flux2_vae_model
from safelight.pipeline import model_stages
from safelight.pipeline.denoise import Denoised, DenoiseInputs
from safelight.request.adapters import Lora
from safelight.request.results import Progress
from safelight.request.schema import Request
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

if not tiny_families():
    pytest.skip("the installed diffusers lacks these models", allow_module_level=True)

from support.flow_combinations import write_lora

SEED = 5


@dataclass(frozen=True)
class Checkpoint:
    """A tiny checkpoint, a LoRA for it, and a checkpoint of SD 1 to switch to."""

    tiny: TinyFamily
    folder: Path
    lora: Lora
    other: Path

    def open(self, root: Path, **settings: object) -> LocalEngine:
        """Open an engine that has made nothing."""
        return self.added(safelight.open_engine(root, **settings))

    def added(self, engine: LocalEngine) -> LocalEngine:
        if engine.library.find_by_name(self.tiny.name) is None:
            engine.library.add(self.folder, self.tiny.name, variant=self.tiny.variant)
        return engine

    def plain(self) -> Request:
        return self.tiny.ask(self.tiny.name)

    def changed(self) -> Request:
        return self.tiny.ask(self.tiny.name, loras=(self.lora,))

    def switch(self) -> Request:
        """A request for another family."""
        return small(self.other)


@pytest.fixture(scope="module", params=thinned(sorted(tiny_families(), key=lambda name: name != "z-image")))
def checkpoint(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Checkpoint]:
    family, place = tiny_families()[request.param], tmp_path_factory.mktemp("rows")
    lora = Lora(str(write_lora(place, family, 1)))
    with pytest.MonkeyPatch.context() as patch:
        family.make_references_small(patch)
        yield Checkpoint(family, family.write_folder(place / "model", SEED), lora, tiny / "a.safetensors")


@pytest.fixture
def right(checkpoint: Checkpoint, root: Path) -> dict[Request, str]:
    """The pixels of each request in an engine that has made nothing else."""
    wanted = (checkpoint.plain(), checkpoint.changed(), checkpoint.switch())
    found = {request: pixels(checkpoint.open(root), request) for request in wanted}
    assert len(set(found.values())) == len(wanted)
    return found


def pixels(engine: LocalEngine, request: Request) -> str:
    return next(engine.generate(request)).pixels_sha256


def test_state_01_02_08_10_11_17_attention_03_in_any_order_with_fresh_memory_poisoned(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str]
) -> None:
    """LoRAs on and off, and other models. Fresh memory is NaN: what reads it makes a black image."""
    engine, chance = checkpoint.open(root), random.Random(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for _ in range(times(6, 30)):
            request = chance.choice(list(right))
            image = next(engine.generate(request))
            assert image.pixels_sha256 == right[request]
            assert image.model_digest == engine.library.find(request.model).digest
    finally:
        torch.use_deterministic_algorithms(False)


def failing_linear(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the n-th call of a linear layer fail; returns where n is counted down."""
    original, countdown = nn.Linear.forward, [-1]

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise RuntimeError("a kernel failed")
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return countdown


@pytest.mark.full
def test_state_27_with_exceptions_thrown_inside_a_linear_layer(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chance = checkpoint.open(root), random.Random(2)
    countdown, failures = failing_linear(monkeypatch), 0
    kept: list[RuntimeError] = []
    for turn in range(12):
        request = chance.choice(list(right))
        engine.resources.embedding_cache.clear()
        countdown[0] = chance.randint(1, 60) if turn % 2 == 0 else -1
        try:
            assert pixels(engine, request) == right[request]
        except RuntimeError as error:
            failures += 1
            kept.append(error)
    assert failures > 3


@pytest.mark.full
def test_state_24_with_old_work_referenced_and_global_state_shaken(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[DenoiseInputs] = []
    original = model_stages.denoise

    def keeping(work: DenoiseInputs) -> Denoised:
        kept.append(work)
        return original(work)

    monkeypatch.setattr(model_stages, "denoise", keeping)
    engine, chance = checkpoint.open(root), random.Random(3)
    for _ in range(8):
        torch.manual_seed(chance.randrange(1000))
        torch.rand(chance.randrange(100))
        torch.set_num_threads(chance.choice([1, 2]))
        request = chance.choice(list(right))
        assert pixels(engine, request) == right[request]
    torch.set_num_threads(1)
    assert len(kept) == 8


@pytest.mark.full
def test_state_28_a_cancel_in_the_middle_leaves_nothing(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str]
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step == 1:
            raise safelight.Cancelled

    engine = checkpoint.open(root)
    for request, wanted in right.items():
        with pytest.raises(safelight.Cancelled):
            next(engine.generate(checkpoint.changed(), stop))
        assert pixels(engine, request) == wanted


@pytest.mark.full
def test_state_29_when_memory_runs_out_the_adapter_is_not_lost(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str]
) -> None:
    with simulated() as device:
        engine = checkpoint.added(open_engine(load_settings(root), device))
        wanted = {request: pixels(engine, request) for request in right}
        for failures in (1, 4):
            engine.loaded.unload(None)
            device.faults.failed_allocations = failures
            try:
                assert pixels(engine, checkpoint.changed()) == wanted[checkpoint.changed()]
            except OutOfMemoryError:
                device.faults.failed_allocations = 0
            for request, made in wanted.items():
                assert pixels(engine, request) == made
        engine.close()


@pytest.mark.full
def test_state_12_load_12_at_the_least_memory_the_pixels_are_the_same(
    checkpoint: Checkpoint, root: Path, right: dict[Request, str]
) -> None:
    least, refused = 0.00001, 0
    for _ in range(20):
        engine = checkpoint.open(root, max_cache_ram_gb=least)
        try:
            assert pixels(engine, checkpoint.changed()) == right[checkpoint.changed()]
        except OutOfMemoryError as error:
            refused += 1
            least = float(str(error).rpartition("; at least ")[2].split(" ")[0])
            continue
        assert pixels(engine, checkpoint.plain()) == right[checkpoint.plain()]
        assert refused
        return
    raise AssertionError(least)


def test_load_12_statistics_of_a_vae_are_no_views_of_streamed_memory() -> None:
    """A view would keep a segment in memory while the VAE computes, beside the segments that it needs."""
    vae = nn.Module()
    vae.bn = nn.BatchNorm2d(8)
    held = {tensor.untyped_storage().data_ptr() for tensor in vae.bn.buffers()}
    for found in flux2_vae_model._statistics(vae, torch.zeros(1, 8, 1, 1), 1e-4):
        assert found.untyped_storage().data_ptr() not in held


def spoil(engine: LocalEngine, role: str, forge: bool) -> None:
    """Write NaN into the bytes in memory. ``forge``: with checksums that agree."""
    residency = engine.resources.residency
    for piece, held in residency.table.residents.items():
        if piece.component_key.startswith(role):
            for tensor in held.buffer.tensors.values():
                tensor.fill_(float("nan"))
            if forge:
                held.checksums = residency.source.compute_checksums(held.buffer)
    engine.resources.embedding_cache.clear()


@pytest.mark.parametrize("forge", thinned([False, True]))
def test_copy_10_11_attention_06_bytes_that_were_spoiled_in_memory_are_read_again(
    checkpoint: Checkpoint, root: Path, forge: bool
) -> None:
    """NaN in any component is found, and is neither a black image nor the end."""
    engine = checkpoint.open(root, verify_transfers="off")
    right = pixels(engine, checkpoint.plain())
    for role in checkpoint.tiny.roles:
        spoil(engine, role, forge)
        image = next(engine.generate(checkpoint.plain()))
        assert image.pixels_sha256 == right
        [repair] = image.metadata["repairs"]
        assert repair["helped"] == ("read again from its file" if forge else "read again")


def nan(backend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments, **more: backend(*arguments, **more) * float("nan")


def test_attention_05_a_kernel_that_breaks_gives_way_to_the_reference(
    checkpoint: Checkpoint, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers call their kernel by diffusers' dispatcher."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backends = _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, AttentionBackendName.NATIVE, nan(backends[AttentionBackendName.NATIVE]))
    image = next(checkpoint.open(root, attention_type="torch-sdp").generate(checkpoint.plain()))
    [repair] = image.metadata["repairs"]
    assert (repair["suspect"], repair["helped"]) == ("attention", "computed with attention_type: normal")
    reference = pixels(checkpoint.open(root, attention_type="normal"), checkpoint.plain())
    assert image.pixels_sha256 == reference
