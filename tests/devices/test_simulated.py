"""The simulated accelerator fails as real ones have failed; our transfers give right bytes or a clear error.

Each fault is also shown to spoil what is read when the protection against it is taken away, so that the tests can see.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import memory

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices import choice, machine, transfer
from safelight.devices.simulated import Faults, Simulated, simulated
from safelight.devices.verification import Verification
from safelight.errors import DeviceLostError, TransferError
from safelight.memory.budget import HOST
from safelight.memory.lease import Use
from safelight.memory.residency import Residency
from safelight.memory.segments import split_into_segments
from safelight.settings_sources import load_settings
from safelight.workers.local_engine import LocalEngine

F32 = torch.float32


def content(residency: Residency, component, passes: int = 1) -> dict[str, torch.Tensor]:
    out = {}
    with residency.lease(component, F32, Use(forward_passes=passes)) as lease:
        for _ in range(passes):
            for name in lease.shapes:
                with lease.use_tensors([name]) as found:
                    out[name] = found.pop().cpu().clone()
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def component(tiny: Path):
    return memory.manifest(tiny / "a.safetensors").component("unet")


@pytest.fixture
def right(component) -> dict[str, torch.Tensor]:
    return content(memory.host(), component)


def budgets(component) -> tuple[int, int]:
    size = sum(segment.nbytes for segment in split_into_segments(component, F32))
    return 2 * size, size // 2


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(lost_waits=3),
        Faults(early_frees=3),
        Faults(corrupt_above=1000, corrupted=2),
    ],
    ids=["none", "copy_03_lost_wait", "copy_01_freed_source", "copy_08_large_copy"],
)
def test_copy_rows_are_repaired(component, right: dict[str, torch.Tensor], faults: Faults, partly: bool) -> None:
    """COPY 01, 02, 03, 08, 09: late, out of order, lost, freed too early, corrupted when large."""
    # A lost wait is seen only if the copy is still under way when this thread reads; a busy machine may hold it up.
    latency = 0.01 if faults.lost_waits else 0.0005
    with simulated(latency=latency, faults=replace(faults)) as device:
        residency = memory.on(device, budgets(component)[partly])
        assert same(content(residency, component, 2), right)
        counts = residency.source.transfers.counts  # type: ignore[attr-defined]
        assert counts.wrong > 0 or faults == Faults()
        residency.drop()
        assert device.allocated() == residency.ledger.stored(device.name) == 0


@pytest.mark.parametrize(
    "faults",
    [Faults(lost_waits=10_000), Faults(early_frees=10_000), Faults(corrupt_above=1000, corrupted=10_000)],
    ids=["lost_wait", "freed_source", "large_copy"],
)
def test_without_verification_the_same_faults_are_seen(component, right, faults: Faults, monkeypatch) -> None:
    """What the tests above would look like with the protection taken away: wrong bytes."""
    with simulated(latency=0.002, faults=replace(faults)) as device:
        residency = memory.on(device)
        residency.source.transfers.verification = Verification("off")  # type: ignore[attr-defined]
        assert not same(content(residency, component), right)


def test_copy_03_the_same_bytes_again_do_not_pass_for_a_copy_that_has_not_arrived() -> None:
    """A slab is filled with what it held already: a lost wait is seen there too, and the source stays until then."""
    with simulated(latency=0.05, faults=Faults()) as device:
        transfers, target = transfer.Transfers(device), device.allocate(4096)
        right = torch.arange(4096, dtype=torch.int64).to(torch.uint8)
        transfers.push("first", right.clone(), target)
        source = right.clone()
        device.faults.lost_waits = 1
        transfers.push("again", source, target)
        source.fill_(0)
        time.sleep(0.2)
        assert torch.equal(target.cpu(), right)
        assert transfers.counts.wrong == 1


def test_without_the_fence_bytes_are_read_before_they_arrive(component, right, monkeypatch) -> None:
    """COPY 05: the fence itself taken out of our transfers."""

    class Unfenced(Simulated):
        def push(self, source, target):
            super().push(source, target)
            return transfer_passed

    transfer_passed = type("Passed", (), {"wait": lambda self: None})()
    device = Unfenced(latency=0.002)
    residency = memory.on(device)
    residency.source.transfers.verification = Verification("off")  # type: ignore[attr-defined]
    assert not same(content(residency, component), right)
    device.close()


def test_copy_07_a_device_that_always_corrupts_ends_in_a_clear_error(component) -> None:
    with simulated(faults=Faults(corrupt_above=0, corrupted=1 << 30)) as device:
        residency = memory.on(device)
        with pytest.raises(TransferError, match="is unreliable"):
            content(residency, component)
        gc.collect()
        residency.drop()
        assert device.allocated() == residency.ledger.stored(device.name) == 0
        device.faults.corrupted = 0
        assert len(content(residency, component)) == len(component.tensors)


def test_copy_11_after_an_eviction_and_a_reload_all_is_as_before(tiny: Path, component, right) -> None:
    other = memory.manifest(tiny / "b.safetensors").component("unet")
    with simulated(latency=0.0002) as device:
        residency = memory.on(device, budgets(component)[0] // 2)
        for _ in range(4):
            assert same(content(residency, component), right)
            content(residency, other)


def test_freed_and_fresh_memory_is_poison() -> None:
    with simulated() as device:
        base = device.allocate(4096)
        assert torch.isnan(base.view(torch.float32)).all().item()
        kept = base[:8].view(torch.float32)
        base.zero_()
        device.release(base)
        assert torch.isnan(kept).all().item()
        assert torch.isnan(torch.empty(8, device=device.torch)).all().item()


def test_a_failed_allocation_is_tried_again_after_dropping(component, right) -> None:
    with simulated(faults=Faults(failed_allocations=1)) as device:
        residency = memory.on(device)
        with pytest.raises(safelight.OutOfMemoryError):
            content(residency, component)
        assert residency.ledger.stored(device.name) == device.allocated()
        assert same(content(residency, component), right)


def small(tiny: Path, name: str = "a", **more) -> safelight.Request:
    return safelight.Request("red apple", str(tiny / f"{name}.safetensors"), steps=2, width=64, height=64, **more)


@pytest.fixture
def on_simulated(root: Path):
    made: list[tuple[Simulated, LocalEngine]] = []

    def make(**settings) -> tuple[Simulated, LocalEngine]:
        device = Simulated(**settings)
        made.append((device, open_engine(load_settings(root, device_working_mem_gb=1e-6), device)))
        return made[-1]

    yield make
    for device, _ in made:
        device.close()


def test_memory_03_a_generation_goes_on_when_an_allocation_fails(on_simulated, tiny: Path, engine: LocalEngine) -> None:
    right = next(engine.generate(small(tiny, precision="fp32"))).pixels_sha256
    device, there = on_simulated()
    for failing in (1, 2, 1):
        device.faults.failed_allocations = failing
        there.resources.residency.drop()
        assert next(there.generate(small(tiny, precision="fp32"))).pixels_sha256 == right


def test_unloading_returns_the_memory_to_other_programs(on_simulated, tiny: Path) -> None:
    device, there = on_simulated()
    model = there.library.add(tiny / "a.safetensors", "a")
    for digest in (model.digest, None):
        next(there.generate(small(tiny)))
        assert device.allocated()
        there.loaded.unload(digest)
        assert device.allocated() == device.cached_bytes == 0


def test_shared_memory_is_counted_once(on_simulated, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac: what is promised to the GPU is not available to the host, and the host keeps no second copy."""
    monkeypatch.setattr(Simulated, "shares_host_memory", True, raising=False)
    monkeypatch.setattr(machine, "tightest_limit", lambda: machine.MemoryLimit(1 << 33, "a test"))
    device, there = on_simulated()
    next(there.generate(small(tiny)))
    host, own = there.tiers
    assert device.allocated()
    assert host.resident_bytes == host.pool.cached_bytes == 0
    host.planner.before_planning()
    before = host.ledger.budget(HOST)
    host.ledger.charge(own.place, 1 << 28, "unet", "computing", stored=False)
    host.planner.before_planning()
    assert before - host.ledger.budget(HOST) == pytest.approx(0.95 * (1 << 28), rel=0.2)


@pytest.mark.parametrize("turns", [True, False])
def test_models_load_beside_an_image_unless_the_device_wants_one_thread(
    turns: bool, on_simulated, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, where two threads that use the device can abort the process."""
    monkeypatch.setattr(Simulated, "wants_one_thread", turns, raising=False)
    _, there = on_simulated()
    other = there.library.add(tiny / "b.safetensors", "b")
    loading = threading.Thread(target=there.loaded.load, args=(other,))
    beside: list[bool] = []

    def on_progress(_: safelight.Progress) -> None:
        if not beside:
            loading.start()
            loading.join(0.7 if turns else 60)
            beside.append(not loading.is_alive())

    next(there.generate(small(tiny), on_progress))
    loading.join(60)
    assert not loading.is_alive()
    assert beside == [not turns]


def test_a_device_that_disappears_is_said_and_the_process_lives(on_simulated, tiny: Path) -> None:
    device, there = on_simulated()
    right = next(there.generate(small(tiny))).pixels_sha256
    device.faults.gone = True
    with pytest.raises(DeviceLostError, match="gone"):
        next(there.generate(small(tiny)))
    device.faults.gone = False
    assert next(there.generate(small(tiny))).pixels_sha256 == right


def test_a_dtype_that_overflows_is_not_chosen() -> None:
    with simulated(faults=Faults(overflow=torch.bfloat16)) as device:
        assert choice.precision("auto", device) == "fp16"
    with simulated() as device:
        assert choice.precision("auto", device) == "bf16"


def test_a_model_larger_than_the_device_runs(on_simulated, tiny: Path, engine: LocalEngine) -> None:
    right = next(engine.generate(small(tiny, precision="fp32"))).pixels_sha256
    device, there = on_simulated(nbytes=16_000_000)
    image = next(there.generate(small(tiny, precision="fp32")))
    assert image.pixels_sha256 == right
    assert there.memory()["places"]["simulated"]["peak"] <= device.nbytes


def test_the_policy_off_copies_without_sums(component) -> None:
    with simulated() as device:
        moves = transfer.Transfers(device, Verification("off"))
        base = device.allocate(100)
        assert moves.push("x", torch.ones(100, dtype=torch.uint8), base, verify=False) is None
        assert transfer.Transfers(device).push("x", torch.ones(100, dtype=torch.uint8), base) is not None


def test_a_second_model_is_verified_like_the_first(tiny: Path, component) -> None:
    """What is verified goes by the piece: labels are the same in every checkpoint of an architecture."""
    other = memory.manifest(tiny / "b.safetensors").component("unet")
    with simulated() as device:
        residency = memory.on(device)
        residency.source.transfers.verification = Verification("first")  # type: ignore[attr-defined]
        content(residency, component)
        device.faults.corrupt_above, device.faults.corrupted = 1000, 1
        assert same(content(residency, other), content(memory.host(), other))
        assert residency.source.transfers.counts.wrong == 1  # type: ignore[attr-defined]


def test_the_last_try_is_verified_too(component) -> None:
    """A device that is wrong three times in a row is not believed the fourth time, whatever the policy."""
    with simulated(faults=Faults(corrupt_above=0, corrupted=1 << 30)) as device:
        residency = memory.on(device)
        residency.source.transfers.verification = Verification("first")  # type: ignore[attr-defined]
        with pytest.raises(TransferError):
            content(residency, component)


def test_a_copy_in_host_memory_that_was_spoiled_is_read_again(component, right) -> None:
    with simulated() as device:
        residency = memory.on(device)
        content(residency, component)
        residency.drop()
        host = residency.source.host  # type: ignore[attr-defined]
        for held in host.table.residents.values():
            next(iter(held.buffer.tensors.values())).data.view(-1)[0] += 1
        assert same(content(residency, component), right)


def test_what_is_on_the_device_needs_nothing_on_the_host(component, right) -> None:
    with simulated() as device:
        residency = memory.on(device, keep=False)
        content(residency, component)
        host = residency.source.host  # type: ignore[attr-defined]
        assert host.resident_bytes == 0
        residency.ledger.set_budget("host", 10)
        assert same(content(residency, component), right)
