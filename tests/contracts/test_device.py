"""What every device must do: see :class:`safelight.devices.base.Device`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import memory
from torch.nn import functional as F

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices import choice, sums
from safelight.devices.base import ALIGNMENT, CountsPeak, Device, free_cache
from safelight.devices.pool import SlabPool
from safelight.memory.lease import Use
from safelight.memory.segments import split_into_segments
from safelight.settings_sources import load_settings
from safelight.weights import slab_views
from safelight.weights.manifest import ManifestTensor


def pattern(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("nbytes", [1, 63, 64, 4096, 1_000_003])
def test_what_is_pushed_comes_back(device: Device, nbytes: int) -> None:
    base, source, back = device.allocate(nbytes), pattern(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
    assert base.shape == (nbytes,)
    assert device.address(base) % ALIGNMENT == 0
    device.push(source, base).wait()
    device.record_fence().wait()
    device.pull(base, back).wait()
    assert torch.equal(back, source)
    assert sums.compute_sum(base) == sums.compute_sum(source)
    device.release(base)


def test_many_copies_at_once_arrive_each_in_its_place(device: Device) -> None:
    count, nbytes = 32, 40_000
    base = device.allocate(count * nbytes)
    sources = [pattern(nbytes, n) for n in range(count)]
    fences = [device.push(source, base[n * nbytes : (n + 1) * nbytes]) for n, source in enumerate(sources)]
    for fence in reversed(fences):
        fence.wait()
        fence.wait()
    assert torch.equal(base.cpu(), torch.cat(sources))


def test_the_allocator_counts(device: Device) -> None:
    before = device.allocated()
    bases = [device.allocate(n) for n in (1, 1000, 5000)]
    if before is not None:
        assert device.allocated() == before + sum(device.rounded(n) for n in (1, 1000, 5000))
    while bases:
        device.release(bases.pop())
    assert device.allocated() == before
    assert device.available() > 0


def test_the_peak_is_counted(device: Device) -> None:
    if not isinstance(device, CountsPeak):
        pytest.skip("its peak is polled")
    before = device.reset_peak()
    base = device.allocate(5_000_000)
    device.release(base)
    del base
    assert 5_000_000 <= device.peak() - before < 5_000_000 + (2 << 20)
    assert device.peak() - device.reset_peak() >= 5_000_000
    assert device.peak() == device.reset_peak() == before


def test_freeing_the_cache_keeps_what_is_in_use(device: Device) -> None:
    source, back = pattern(3 << 20), torch.zeros(3 << 20, dtype=torch.uint8)
    kept, freed = device.allocate(3 << 20), device.allocate(5 << 20)
    device.push(source, kept).wait()
    device.release(freed)
    del freed
    allocated = device.allocated()
    free_cache(device)
    assert device.allocated() == allocated
    device.pull(kept, back).wait()
    assert torch.equal(back, source)
    device.release(kept)


def test_staging_is_host_memory(device: Device) -> None:
    staging = device.staging(10_000)
    assert staging.device.type == "cpu"
    assert staging.data_ptr() % ALIGNMENT == 0


def test_tensors_of_both_sides_do_not_mix(device: Device) -> None:
    """LOAD 11: a tensor on the wrong device is an error, not a silent copy."""
    here, there = torch.ones(3, 3), torch.ones(3, 3).to(device.torch)
    if not device.has_own_memory:
        pytest.skip("its memory is the host's")
    for mix in (lambda: here + there, lambda: F.linear(there, here), lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match=r"device|simulated"):
            mix()


def test_slabs_are_used_again_only_when_nobody_holds_them(device: Device) -> None:
    pool = SlabPool(device)
    slab = pool.take(1 << 20)
    address = device.address(slab.base)
    assert pool.give(slab)
    again = pool.take(1 << 20)
    assert device.address(again.base) == address
    view = again.base[64:128]
    assert not pool.give(again)
    assert (pool.cached_bytes, pool.lingering_bytes) == (0, 1 << 20)
    other = pool.take(1 << 20)
    assert device.address(other.base) != address
    del view
    assert pool.lingering_bytes == 0
    pool.give(other)
    pool.trim()
    assert pool.cached_bytes == pool.used_bytes == 0


@pytest.mark.parametrize("share", [2.0, 0.5])
def test_a_component_arrives_whole_or_streamed(device: Device, tiny: Path, share: float) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    with memory.host().lease(component, torch.float32) as lease:
        right = {name: lease.resident_tensor(name).clone() for name in lease.shapes}  # type: ignore[union-attr]
    size = sum(segment.nbytes for segment in split_into_segments(component, torch.float32))
    budget = int(size * share)
    residency = memory.on(device, budget) if device.has_own_memory else memory.host(budget)
    with residency.lease(component, torch.float32, Use(forward_passes=2)) as lease:
        for _ in range(2):
            for name, tensor in right.items():
                with lease.use_tensors([name]) as found:
                    assert found[0].device.type == device.torch.type
                    assert torch.equal(found.pop().cpu(), tensor)
        assert (lease.ring is None) == (share > 1)
        assert residency.ledger.peak(residency.place) <= budget
        if device.allocated() is not None:
            assert device.allocated() == residency.ledger.stored(residency.place)
    residency.drop()
    assert residency.ledger.stored(residency.place) == 0


def test_precision_is_tried(device: Device) -> None:
    assert choice.precision("auto", device) in ("fp32", "bf16", "fp16")


def test_two_models_switch_and_each_keeps_its_pixels(device: Device, tiny: Path, root: Path) -> None:
    """The whole path, A, B, A; where bits can be the CPU's, they are."""
    engine = open_engine(load_settings(root), device)
    cpu = open_engine(load_settings(root))
    made, right = dict[str, str](), dict[str, str]()
    for name in ("a", "b", "a"):
        request = safelight.Request("red apple", str(tiny / f"{name}.safetensors"), steps=2, width=64, height=64)
        request = safelight.Request(**{f: getattr(request, f) for f in request.__slots__} | {"precision": "fp32"})
        image = next(engine.generate(request))
        assert made.setdefault(name, image.pixels_sha256) == image.pixels_sha256
        assert image.metadata["run"]["device"] == device.name
        if device.name in ("cpu", "simulated", "remote"):
            right[name] = right.get(name) or next(cpu.generate(request)).pixels_sha256
            assert image.pixels_sha256 == right[name]
    assert made["a"] != made["b"]
    engine.close()
    for place, values in engine.memory()["places"].items():
        assert values["stored"] == 0, place


def test_each_tensor_of_a_slab_holds_it_once(device: Device) -> None:
    """Else a slab that nobody uses would look as if somebody did, and nothing would be brought ahead into it."""
    slab = SlabPool(device).take(1 << 16)
    tensors = tuple(ManifestTensor(name, "F32", (8, 16), Path("x"), 0, 512, False, "") for name in "abc")
    views = slab_views.views(slab.base, tensors, [torch.bfloat16] * 3)
    assert slab.holders() == len(views) == 3
    views.clear()
    assert slab.holders() == 0
