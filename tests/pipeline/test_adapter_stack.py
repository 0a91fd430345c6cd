"""Adapters' own memory: it follows what the machine allows, and the numbers stay the same."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support import memory

from safelight.devices.simulated import simulated
from safelight.memory.budget import HOST
from safelight.memory.lease import Lease, Use
from safelight.memory.residency import Residency
from safelight.memory.segments import split_into_segments
from safelight.pipeline.adapter_stack import RowReplacement, stack_adapters
from safelight.weights.manifest import ComponentManifest


@pytest.mark.parametrize("on_device", [False, True])
def test_adapters_give_memory_back_when_it_shrinks_and_take_it_when_it_grows(on_device: bool, tiny: Path) -> None:
    """The "adapter" is the UNet of another model. It replaces all weights."""
    component, adapter = (memory.manifest(tiny / f"{name}.safetensors").component("unet") for name in "ab")
    segments = split_into_segments(component, torch.float32)
    size, largest = sum(one.nbytes for one in segments), max(one.nbytes for one in segments)
    rows = [RowReplacement(adapter, one.name, one.name, tuple(range(one.shape[0]))) for one in component.tensors]
    with simulated(nbytes=1 << 30) as device:
        # Streamed on the device, so that the adapter is used again.
        there = memory.on(device, budget=largest * 4) if on_device else memory.host()
        host = memory.tiers(there)[1] if on_device else there
        free = [1 << 30]
        host.planner.before_planning = lambda: there.ledger.set_budget(HOST, free[0])

        def leasing(source: ComponentManifest) -> AbstractContextManager[Lease]:
            return host.lease(source, torch.float32)

        changed = stack_adapters(component, [], leasing, rows)
        right = weights(host, adapter)
        with there.lease(changed, torch.float32, Use(forward_passes=9)) as lease:
            for allowed in (1 << 30, largest * 8, 1 << 30):
                free[0] = allowed
                lease.adjust()
                for name, tensor in right.items():
                    with lease.use_tensors([name]) as found:
                        assert torch.equal(found.pop().cpu(), tensor), name
                held = sum(one.nbytes for one in host.usage_by_component() if adapter.digest[:8] in one.component)
                assert held == size if allowed > size * 2 else held < size
                assert there.ledger.stored(HOST) <= allowed
        there.drop()
        host.drop()
        assert there.ledger.stored(HOST) == 0


def weights(host: Residency, component: ComponentManifest) -> dict[str, torch.Tensor]:
    found = dict[str, torch.Tensor]()
    with host.lease(component, torch.float32) as lease:
        for one in component.tensors:
            with lease.use_tensors([one.name]) as used:
                found[one.name] = used.pop().clone()
    host.drop()
    return found
