"""The host's memory behind a device: copies kept there follow what the machine allows, while the device works too."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from support import memory

from safelight.devices.simulated import simulated
from safelight.devices.verification import Verification
from safelight.memory.budget import HOST
from safelight.memory.host_source import HostSource
from safelight.memory.lease import Use
from safelight.memory.segments import split_into_segments


def test_the_hosts_copies_go_when_others_want_its_memory_and_come_back(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    segments = split_into_segments(component, torch.float32)
    size = sum(segment.nbytes for segment in segments)
    largest = max(segment.nbytes for segment in segments)
    with simulated(nbytes=1 << 30) as device:
        # Streamed on the device, so that the host's copy is in use.
        there = memory.on(device, budget=max(size // 2, largest * 4))
        host = memory.tiers(there)[1]
        free = [1 << 30]
        host.planner.before_planning = lambda: there.ledger.set_budget(HOST, free[0])
        with there.lease(component, torch.float32, Use(forward_passes=9)) as lease:

            def used() -> int:
                for segment in segments:
                    for tensor in segment.tensors:
                        with lease.use_tensors([tensor.name]) as found:
                            assert torch.isfinite(found.pop().cpu()).all()
                return host.resident_bytes

            assert used() == size
            free[0] = largest * 2
            lease.adjust()
            assert used() <= largest * 2
            assert there.ledger.stored(HOST) <= largest * 2
            free[0] = 1 << 30
            lease.adjust()
            assert used() == size
        host.drop()
        assert there.ledger.stored(HOST) == 0


def test_what_nobody_holds_on_the_host_goes_first(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device)
        host = memory.tiers(there)[1]
        with there.lease(component, torch.float32):
            pass
        assert host.resident_bytes > 0
        host.planner.before_planning = lambda: there.ledger.set_budget(HOST, 0)
        with there.lease(component, torch.float32) as lease:
            lease.adjust()
            assert host.resident_bytes == there.ledger.stored(HOST) == 0
            assert lease.resident_bytes > 0


def test_a_copy_that_was_not_summed_is_known_wrong_later(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what arrived rightly once, as often as somebody looks."""
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device)
        source = cast("HostSource", there.source)
        verification = source.transfers.verification = Verification("first")
        push = device.push
        for right in (True, False, True):
            if not right:
                monkeypatch.setattr(device, "push", lambda given, target: push(given.roll(-64), target))
            with there.lease(component, torch.float32) as lease:
                assert lease.has_unverified == (verification.uses > len(lease.segments))
                assert (lease.verify() == []) == right
                assert not lease.has_unverified or not right
            monkeypatch.undo()
            there.drop()
