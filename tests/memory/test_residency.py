"""Leases, the budget, eviction, and components that are resident only in part."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from support import memory

from safelight.devices import transfer
from safelight.devices.cpu import CPU
from safelight.devices.simulated import Simulated
from safelight.errors import BindingError, IntegrityError, OutOfMemoryError
from safelight.memory.account import BUFFERS
from safelight.memory.budget import HOST, Ledger
from safelight.memory.lease import Lease, Use
from safelight.memory.residency import Residency
from safelight.memory.segments import split_into_segments
from safelight.memory.source import FileSource
from safelight.weights.manifest import ComponentManifest, Manifest
from safelight.weights.slab_views import bytes_needed

F32 = torch.float32


@pytest.fixture(scope="module")
def two(tiny: Path) -> tuple[Manifest, Manifest]:
    return memory.manifest(tiny / "a.safetensors"), memory.manifest(tiny / "b.safetensors")


@pytest.fixture
def device() -> Generator[Simulated]:
    device = Simulated(nbytes=memory.PLENTY)
    yield device
    device.close()


def whole(component: ComponentManifest) -> int:
    return sum(segment.nbytes for segment in split_into_segments(component, F32))


def content(lease: Lease) -> dict[str, torch.Tensor]:
    """All tensors, copied one after another in the order of use, wherever they come from."""
    out = {}
    for name in lease.shapes:
        with lease.use_tensors([name]) as tensors:
            out[name] = tensors.pop().clone()
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def expected(component: ComponentManifest) -> dict[str, torch.Tensor]:
    """The tensors of a component, with plenty of memory."""
    with memory.host().lease(component, F32) as lease:
        return content(lease)


def exact(residency: Residency) -> bool:
    """The ledger equals the slabs that live."""
    pool = residency.pool
    there = pool.used_bytes + pool.cached_bytes + pool.lingering_bytes
    return residency.ledger.stored(HOST) == there


def test_the_budget_is_a_bound(two: tuple[Manifest, Manifest]) -> None:
    """Room is made before reading: slabs in use and kept free never pass the budget."""
    residency = memory.host(whole(two[0].component("unet")) * 11 // 10)
    for turn in range(6):
        component = two[turn % 2].component("unet")
        with residency.lease(component, F32) as lease:
            assert lease.component.digest == component.digest
            assert exact(residency)
    assert residency.ledger.peak(HOST) <= residency.ledger.budget(HOST)


def test_slabs_are_reused_from_switch_to_switch(two: tuple[Manifest, Manifest]) -> None:
    residency = memory.host(whole(two[0].component("unet")))
    addresses = set()
    for turn in range(4):
        with residency.lease(two[turn % 2].component("unet"), F32) as lease:
            addresses.add(frozenset(held.buffer.slab.base.data_ptr() for held in lease.residents.values()))
    assert len(addresses) == 1


def test_what_is_leased_is_never_evicted(two: tuple[Manifest, Manifest]) -> None:
    residency = memory.host(whole(two[0].component("unet")) * 11 // 10, partial=False)
    with residency.lease(two[0].component("unet"), F32) as held:
        before = content(held)
        with pytest.raises(OutOfMemoryError, match="; at least "), residency.lease(two[1].component("unet"), F32):
            pass
        residency.drop()
        assert same(content(held), before)
    residency.drop()
    assert residency.resident_bytes == 0
    assert residency.ledger.stored(HOST) == 0


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_component_larger_than_the_budget_is_streamed(two: tuple[Manifest, Manifest], share: float) -> None:
    component = two[0].component("unet")
    with memory.host().lease(component, F32) as lease:
        right = content(lease)
    residency = memory.host(int(whole(component) * share))
    with residency.lease(component, F32, Use(forward_passes=3)) as lease:
        assert 0 < lease.resident_bytes < whole(component)
        for _ in range(3):
            assert same(content(lease), right)
        assert exact(residency)
    assert residency.ledger.peak(HOST) <= residency.ledger.budget(HOST)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_nobody_reads_is_not_brought(
    two: tuple[Manifest, Manifest], device: Simulated, place: str, share: float
) -> None:
    """It comes neither to the device nor to the host. A later lease that reads it brings it."""
    component = two[0].component("unet")
    *read, last = split_into_segments(component, F32)
    use = Use(unread=frozenset(tensor.name for tensor in last.tensors))
    budget = int(share * sum(segment.nbytes for segment in read))
    residency = memory.host(budget) if place == "host" else memory.on(device, budget)
    with residency.lease(component, F32, use) as lease:
        assert (len(lease.residents) < len(read)) is (share < 1)
        assert all(last.piece not in tier.table.residents for tier in memory.tiers(residency))
        assert residency.planner.min_weight_bytes(component, F32, use.unread) <= budget
        for segment in read:
            with lease.use_tensors([tensor.name for tensor in segment.tensors]):
                pass
        with (
            pytest.raises(BindingError, match="declares that it never reads"),
            lease.use_tensors([last.tensors[0].name]),
        ):
            pass
    with residency.lease(component, F32) as lease:
        assert same({name: tensor.cpu() for name, tensor in content(lease).items()}, expected(component))


def test_buffers_count_against_the_memory_and_not_against_the_setting(two: tuple[Manifest, Manifest]) -> None:
    component, buffers = two[0].component("unet"), 1 << 20
    least = memory.host().planner.min_weight_bytes(component, F32)

    def load(budget: int, max_bytes: int) -> None:
        ledger = Ledger({HOST: budget})
        ledger.charge(HOST, buffers, "unet", BUFFERS, already_used=True)
        residency = Residency(CPU(), ledger, HOST, FileSource(1), max_bytes=max_bytes)
        with residency.lease(component, F32):
            pass

    load(memory.PLENTY, least)
    with pytest.raises(OutOfMemoryError, match="max_cache_ram_gb is"):
        load(memory.PLENTY, least - 512)
    with pytest.raises(OutOfMemoryError, match="This process can use"):
        load(least + buffers - 512, least + buffers // 2)


def test_the_least_is_said_and_is_enough(two: tuple[Manifest, Manifest]) -> None:
    component = two[0].component("unet")
    with pytest.raises(OutOfMemoryError) as refused, memory.host(100).lease(component, F32):
        pass
    least = refused.value.needed
    with pytest.raises(OutOfMemoryError), memory.host(least - 1).lease(component, F32):
        pass
    with memory.host(least).lease(component, F32) as lease:
        assert len(content(lease)) == len(component.tensors)
    with pytest.raises(OutOfMemoryError, match="enable_partial_loading"):  # noqa: SIM117
        with memory.host(least, partial=False).lease(component, F32):
            pass


def test_memory_04_working_memory_is_promised_before(two: tuple[Manifest, Manifest]) -> None:
    component, budget = two[0].component("vae"), whole(two[0].component("vae")) + 1_000_000
    residency = memory.host(budget)
    with residency.lease(component, F32, Use(working_bytes=1_000_000)) as lease:
        assert lease.ring is None
        assert residency.ledger.reserved(HOST) == 1_000_000
    assert residency.ledger.reserved(HOST) == 0
    with residency.lease(component, F32, Use(working_bytes=1_500_000)) as lease:
        assert lease.ring is not None


def test_the_budget_shrinks_and_grows_in_the_middle(two: tuple[Manifest, Manifest]) -> None:
    component = two[0].component("unet")
    size = whole(component)
    residency = memory.host(size * 2)
    changes: list[tuple[bool, int]] = []
    with residency.lease(two[1].component("vae"), F32), residency.lease(component, F32, Use(forward_passes=4)) as lease:
        lease.on_change = lambda names, resident: changes.append((resident, len(names)))
        right = content(lease)
        held = residency.ledger.stored(HOST) - size
        for budget in (size // 2, size // 5, size * 2, size // 3):
            residency.ledger.set_budget(HOST, held + budget)
            lease.adjust()
            assert residency.ledger.stored(HOST) <= held + budget
            assert same(content(lease), right)
            assert (lease.ring is None) == (budget > size)
            assert exact(residency)
    assert [resident for resident, _ in changes] == [False, False, True, False]


def test_when_not_even_the_least_is_left_what_runs_goes_on(two: tuple[Manifest, Manifest]) -> None:
    component = two[0].component("unet")
    residency = memory.host()
    with residency.lease(component, F32) as lease:
        right = content(lease)
        residency.ledger.set_budget(HOST, 10)
        lease.adjust()
        assert same(content(lease), right)
        assert residency.ledger.stored(HOST) <= max(segment.nbytes for segment in lease.segments)


def test_memory_06_two_threads_share_one_load(two: tuple[Manifest, Manifest]) -> None:
    residency = memory.host()
    component = two[0].component("vae")
    seen: list[frozenset[int]] = []

    def hold() -> None:
        for _ in range(20):
            with residency.lease(component, F32) as lease:
                seen.append(frozenset(held.buffer.slab.base.data_ptr() for held in lease.residents.values()))

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    assert len(set(seen)) == 1


def test_a_failed_load_leaves_nothing_behind(two: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is kept holds its slab; the ledger counts it for as long."""
    residency = memory.host()
    component = two[0].component("vae")
    original, calls = transfer._fill, 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise OSError("the disk is gone")
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "_fill", fail)
    kept: list[BaseException] = []
    try:
        with residency.lease(component, F32):
            pass
    except OSError as error:
        kept.append(error)
    assert residency.resident_bytes == 0
    assert exact(residency)
    monkeypatch.setattr(transfer, "_fill", original)
    with residency.lease(component, F32) as lease:
        assert len(content(lease)) == len(component.tensors)
    kept.clear()
    residency.drop()
    assert residency.ledger.stored(HOST) == 0


def test_an_error_within_a_lease_ends_it(two: tuple[Manifest, Manifest]) -> None:
    residency = memory.host()
    with pytest.raises(ZeroDivisionError), residency.lease(two[0].component("vae"), F32, Use(working_bytes=5)):
        raise ZeroDivisionError
    assert residency.ledger.reserved(HOST) == 0
    residency.drop()
    assert residency.ledger.stored(HOST) == 0


def test_wrong_bytes_are_never_leased(two: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(two[0].components[0].tensors[0].path.read_bytes())
    component = memory.manifest(path).component("unet")
    place = component.tensors[len(component.tensors) // 2]
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 1
    path.write_bytes(data)
    for budget in (memory.PLENTY, whole(component) // 3):
        residency = memory.host(budget)
        with pytest.raises(IntegrityError, match="manifest"), residency.lease(component, F32) as lease:
            content(lease)
        assert exact(residency)


def test_bytes_that_change_in_memory_are_found(two: tuple[Manifest, Manifest]) -> None:
    """Also those written through ``.data``, which no version counter sees."""
    residency = memory.host()
    component = two[0].component("unet")
    with residency.lease(component, F32) as lease:
        assert lease.verify() == []
        lease.resident_tensor("conv_out.weight").data.view(-1)[7] += 1e-3  # type: ignore[union-attr]
        (label,) = lease.verify()
        assert "conv_out" in label
    with residency.lease(component, F32) as lease:
        assert lease.verify() == []


def test_memory_05_one_evicted_segment_is_all_that_is_read_again(
    two: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    component, other = two[0].component("unet"), two[1].component("vae")
    residency = memory.host(whole(component) + whole(other) // 2)
    with residency.lease(component, F32):
        pass
    with residency.lease(other, F32):
        pass
    there = residency.resident_bytes - whole(other)
    read: list[int] = []
    original = transfer._read
    monkeypatch.setattr(transfer, "_read", lambda r, d: (read.append(r.target.nbytes), original(r, d))[1])
    with residency.lease(component, F32):
        pass
    assert 0 < sum(read) <= whole(component) - there


def test_resident_bytes_of_a_component(two: tuple[Manifest, Manifest]) -> None:
    component = two[0].component("vae")
    exact = bytes_needed(component.tensors, [F32] * len(component.tensors))
    assert exact <= whole(component) < exact * 1.1


def test_other_models_go_first_when_the_budget_shrinks_meanwhile(two: tuple[Manifest, Manifest]) -> None:
    """The running component still fits; what is warm beside it, and what was kept, is given back at the next step."""
    running, warm = two[0].component("unet"), two[1].component("unet")
    residency = memory.host()
    with residency.lease(warm, F32):
        pass
    with residency.lease(running, F32) as lease:
        residency.ledger.set_budget(HOST, whole(running) + 1000)
        lease.adjust()
        assert residency.ledger.stored(HOST) <= whole(running) + 1000
        assert lease.ring is None
        assert exact(residency)


def test_a_load_that_fails_does_not_spoil_what_is_said_of_memory(two: tuple[Manifest, Manifest]) -> None:
    component = two[0].component("unet")
    residency = memory.host(whole(component) // 2)
    taken = residency.pool.take

    def fail(nbytes: int, owner: str = "", reason: str = "weights"):
        if reason == "ring slot":
            raise KeyboardInterrupt
        return taken(nbytes, owner, reason)

    residency.pool.take = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), residency.lease(component, F32):
        pass
    assert all(0 < usage.nbytes <= usage.total for usage in residency.usage_by_component())
    assert all(usage.leases == 0 for usage in residency.usage_by_component())


def test_a_circle_of_references_does_not_keep_a_model_out(two: tuple[Manifest, Manifest]) -> None:
    """MEMORY 03: an error and its frames hold a tensor of the last model until garbage is collected; a lease that would
    be refused for that collects it."""
    first, second = (manifest.component("unet") for manifest in two)
    size = sum(segment.nbytes for segment in split_into_segments(first, torch.float32))
    residency = memory.host(size, partial=False)
    circle: list[object] = []
    with residency.lease(first, torch.float32) as lease:
        circle += [circle, lease.resident_tensor(next(iter(lease.shapes)))]
    residency.drop()
    assert residency.pool.lingering_bytes > 0
    del circle, lease
    with residency.lease(second, torch.float32) as lease:
        assert lease.resident_bytes == size
