"""Weights that stay quantised in memory: resident and streamed, the numbers are right, and slabs are used again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import memory
from support.compact_files import write_compact
from support.families import tiny_families

from safelight.catalog.catalog import Catalog
from safelight.devices.cpu import CPU
from safelight.devices.pool import SlabPool
from safelight.errors import OutOfMemoryError
from safelight.memory.dequantiser import Dequantiser
from safelight.memory.lease import Use
from safelight.memory.segments import split_into_segments
from safelight.weights.manifest import ComponentManifest

if not {"flux"} <= set(tiny_families()):
    pytest.skip("the installed libraries lack some of these models", allow_module_level=True)

SEED = 5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComponentManifest, dict[str, torch.Tensor]]:
    """Return T5 in Q8_0, which stays quantised, and its numbers by the names of its module."""
    folder = tmp_path_factory.mktemp("quantised")
    path = tiny_families()["flux"].write_files(folder, SEED)["text_encoder_2"]
    compact, numbers = write_compact(path, load_file(path), "Q8_0")
    [component] = Catalog.under(folder / "root").adapters.add(compact).manifest.components
    named = {
        row.name: next(numbers[one.name] for one in row.sources if one.name in numbers)
        for row in component.config.rows()
    }
    return replace(component, compact=True), named


def use_of(component: ComponentManifest, dtype: torch.dtype) -> Use:
    return Use(forward_passes=2, dequantised_bytes=memory.host().planner.dequantised_bytes(component, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [False, True])
def test_every_tensor_is_right(
    streams: bool, dtype: torch.dtype, written: tuple[ComponentManifest, dict[str, torch.Tensor]]
) -> None:
    component, numbers = written
    planner = memory.host().planner
    least, use = planner.min_weight_bytes(component, dtype), use_of(component, dtype)
    residency = memory.host(least) if streams else memory.host()
    names = [tensor.name for tensor in component.tensors]
    with residency.lease(component, dtype, use) as lease:
        assert (lease.ring is not None) == streams
        for _ in range(2):
            for name in names:
                with lease.use_tensors([name]) as [tensor]:
                    assert tensor.dtype == dtype
                    assert torch.equal(tensor, numbers[name].to(dtype)), name
                    assert tensor.data_ptr() % 64 == 0
                    del tensor
        assert sum(lease.resident_tensor(name) is None for name in names) > len(names) / 2
        reasons = {entry.reason: entry.nbytes for entry in residency.ledger.entries()}
        assert reasons["dequantised weights"] == use.dequantised_bytes > 0
    if streams:
        assert residency.ledger.peak("host") == least
    assert "dequantised weights" not in {entry.reason for entry in residency.ledger.entries()}


def test_a_lease_leaves_room_for_what_it_dequantises(
    written: tuple[ComponentManifest, dict[str, torch.Tensor]],
) -> None:
    component, _ = written
    use = use_of(component, torch.float32)
    whole = sum(segment.nbytes for segment in split_into_segments(component, torch.float32))
    with memory.host(whole + use.dequantised_bytes).lease(component, torch.float32, use) as lease:
        assert lease.ring is None
        assert lease.dequantiser.slab_bytes == use.dequantised_bytes, "nobody else takes the room meanwhile"
    with memory.host(whole + use.dequantised_bytes - 1).lease(component, torch.float32, use) as lease:
        assert lease.ring is not None
        lease.adjust()
        assert lease.ring is not None
    least = memory.host().planner.min_weight_bytes(component, torch.float32)
    with pytest.raises(OutOfMemoryError), memory.host(least - 1).lease(component, torch.float32, use):
        pass


def test_an_operation_that_dequantises_more_than_the_plan_expects_goes_on(
    written: tuple[ComponentManifest, dict[str, torch.Tensor]],
) -> None:
    component, numbers = written
    use = use_of(component, torch.float32)
    enough = sum(one.nbytes for one in split_into_segments(component, torch.float32)) + use.dequantised_bytes
    residency = memory.host(enough)
    names = [tensor.name for tensor in component.tensors if component.stays_compact(tensor)][:2]
    with residency.lease(component, torch.float32, use) as lease, lease.use_tensors(names) as tensors:
        assert all(torch.equal(one, numbers[name]) for one, name in zip(tensors, names, strict=True))
        assert residency.ledger.stored("host") > enough
        del tensors


def test_a_slab_is_used_again_only_if_nobody_holds_a_tensor_in_it(
    written: tuple[ComponentManifest, dict[str, torch.Tensor]],
) -> None:
    component, numbers = written
    name = next(tensor.name for tensor in component.tensors if component.stays_compact(tensor))
    [one] = [tensor for tensor in component.tensors if tensor.name == name]
    with one.path.open("rb") as file:
        file.seek(one.offset)
        raw = torch.frombuffer(bytearray(file.read(one.nbytes)), dtype=torch.uint8)
    dequantiser = Dequantiser(component, torch.float32, SlabPool(CPU()))
    first = dequantiser.dequantise(name, raw)
    held: Any = first[:1]
    second = dequantiser.dequantise(name, raw)
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, numbers[name])
    place = first.data_ptr()
    del first
    third = dequantiser.dequantise(name, raw)
    assert third.data_ptr() not in (place, second.data_ptr())
    del held
    assert dequantiser.dequantise(name, raw).data_ptr() == place


def test_threads_that_begin_later_compute_on_as_many_cores(
    written: tuple[ComponentManifest, dict[str, torch.Tensor]],
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    component, _ = written
    one = next(tensor for tensor in component.tensors if component.stays_compact(tensor))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Dequantiser(component, torch.float32, SlabPool(CPU())).dequantise(
            one.name, torch.zeros(one.nbytes, dtype=torch.uint8)
        )
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
