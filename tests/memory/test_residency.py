"""Leases, the limit, and eviction."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from safelight.devices.pool import SlabPool
from safelight.errors import IntegrityError, OutOfMemoryError
from safelight.formats.identify import identify
from safelight.memory.residency import Residency
from safelight.weights.manifest import Manifest, measure
from safelight.weights.store import resident_bytes

CPU = torch.device("cpu")
F32 = torch.float32


def manifest(path: Path) -> Manifest:
    layout = identify(path).layout
    assert layout is not None
    return measure(layout.components)


@pytest.fixture(scope="module")
def two(tiny: Path) -> tuple[Manifest, Manifest]:
    return manifest(tiny / "a.safetensors"), manifest(tiny / "b.safetensors")


def test_the_limit_is_a_bound(two: tuple[Manifest, Manifest]) -> None:
    """Room is made before reading: slabs in use and kept free never pass the limit."""
    needed = resident_bytes(two[0].component("unet"), F32)
    residency = Residency(SlabPool(CPU), int(needed * 1.1), 1)
    for turn in range(6):
        with residency.lease(two[turn % 2].component("unet"), F32) as weights:
            assert weights.digest == two[turn % 2].component("unet").digest
            assert residency.pool.used_bytes + residency.pool.kept_bytes <= residency.limit


def test_slabs_are_reused_from_switch_to_switch(two: tuple[Manifest, Manifest]) -> None:
    needed = resident_bytes(two[0].component("unet"), F32)
    residency = Residency(SlabPool(CPU), int(needed * 1.1), 1)
    addresses = set()
    for turn in range(4):
        with residency.lease(two[turn % 2].component("unet"), F32) as weights:
            addresses.add(weights.slab.base.data_ptr())
    assert len(addresses) == 1


def test_what_is_leased_is_never_evicted(two: tuple[Manifest, Manifest]) -> None:
    needed = resident_bytes(two[0].component("unet"), F32)
    residency = Residency(SlabPool(CPU), int(needed * 1.1), 1)
    with residency.lease(two[0].component("unet"), F32) as held:
        before = {name: tensor.clone() for name, tensor in held.tensors.items()}
        with pytest.raises(OutOfMemoryError, match="max_cache_ram_gb"), residency.lease(two[1].component("unet"), F32):
            pass
        residency.drop()
        assert all(torch.equal(held.tensors[name], tensor) for name, tensor in before.items())
    residency.drop()
    assert residency.resident_bytes == 0


def test_memory_06_two_threads_share_one_load(two: tuple[Manifest, Manifest]) -> None:
    residency = Residency(SlabPool(CPU), 1 << 30, 1)
    component = two[0].component("vae")
    seen: list[int] = []

    def hold() -> None:
        for _ in range(20):
            with residency.lease(component, F32) as weights:
                seen.append(weights.slab.base.data_ptr())

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    assert len(set(seen)) == 1


def test_state_20_a_failed_load_leaves_all_usable(two: tuple[Manifest, Manifest], tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes((tiny / "a.safetensors").read_bytes())
    spoiled = manifest(path).component("vae")
    data = bytearray(path.read_bytes())
    place = spoiled.tensors[-1]
    data[place.offset] ^= 1
    path.write_bytes(data)
    residency = Residency(SlabPool(CPU), 1 << 30, 1)
    for _ in range(3):
        with pytest.raises(IntegrityError, match=r"decoder\.conv_out\.bias"), residency.lease(spoiled, F32):
            pass
    assert residency.resident_bytes == 0
    assert residency.pool.used_bytes == 0
    with residency.lease(two[1].component("vae"), F32) as weights:
        assert weights.tensors
    assert residency.resident_bytes == residency.pool.used_bytes


def test_dropping_one_model(two: tuple[Manifest, Manifest]) -> None:
    residency = Residency(SlabPool(CPU), 1 << 30, 1)
    for each in two:
        with residency.lease(each.component("vae"), F32):
            pass
    residency.drop(two[0].component("vae").digest)
    assert residency.resident_bytes == resident_bytes(two[1].component("vae"), F32)
