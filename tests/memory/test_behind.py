"""The host's memory behind a device: copies kept there follow what the machine allows, while the device works too."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import cast

import pytest
import torch
from support import memory

from safelight.devices.simulated import Faults, simulated
from safelight.devices.transfer import Transfers
from safelight.devices.verification import Policy, Verification
from safelight.errors import IntegrityError, TransferError
from safelight.memory.budget import HOST
from safelight.memory.host_source import HostSource
from safelight.memory.lease import Use
from safelight.memory.segments import split_into_segments
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import Bring, OpenedOverlays, OverlaidComponent, Overlay, with_overlays


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


def overlaid(component: ComponentManifest, function: Overlay, names: tuple[str, ...] = ()) -> OverlaidComponent:
    """A component with an overlay over the named weights, or over its first one."""
    chosen = names or (component.tensors[0].name,)

    @contextlib.contextmanager
    def open_overlays(bring: Bring) -> Generator[OpenedOverlays]:
        del bring
        yield OpenedOverlays(dict.fromkeys(chosen, function))

    # The digest stands for the content, and segments are cached by it.
    return with_overlays(component, hash_texts(*chosen), frozenset(chosen), open_overlays)


@pytest.mark.parametrize("streams", [False, True])
def test_the_device_computes_overlays_and_the_host_has_no_result(streams: bool, tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    changed = overlaid(component, lambda weight: weight.mul_(2))
    name = component.tensors[0].name
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device)
        least = there.planner.min_weight_bytes(component, torch.float32)
        there = memory.on(device, least if streams else memory.PLENTY)
        with there.lease(component, torch.float32) as lease, lease.use_tensors([name]) as [tensor]:
            right = tensor.cpu() * 2
            del tensor
        for _ in range(2):
            with there.lease(changed, torch.float32) as lease, lease.use_tensors([name]) as [tensor]:
                assert (lease.ring is not None) == streams
                assert torch.equal(tensor.cpu(), right)
                del tensor
            there.drop()
        host = cast("HostSource", there.source).host
        assert not any("+" in one.component for one in host.usage_by_component())


def test_an_overlay_that_comes_out_otherwise_on_the_device_is_an_error(tiny: Path) -> None:
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    times = iter((1.0, 1.0, 1.5))
    changed = overlaid(component, lambda weight: weight.add_(next(times)))
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device)
        for _ in range(2):
            with there.lease(changed, torch.float32):
                pass
            there.drop()
        with pytest.raises(IntegrityError, match="differs from the first time"), there.lease(changed, torch.float32):
            pass
        there.drop()
        assert there.ledger.stored(device.name) == 0


def test_a_corrupted_copy_of_an_adapter_is_repaired() -> None:
    """What arrived wrong is copied again in small pieces."""
    tensor = torch.arange(100_000, dtype=torch.float32)
    with simulated(nbytes=1 << 30, faults=Faults(corrupted=1, corrupt_above=1000), staging_buffer_bytes=0) as device:
        transfers = Transfers(device, Verification("always"))
        assert torch.equal(transfers.bring("an adapter", tensor).cpu(), tensor)
        assert (transfers.counts.wrong, transfers.counts.repaired) == (1, 1)
        assert transfers.bring("nothing", tensor[:0]).shape == (0,)


def test_what_was_in_a_slab_before_changes_no_sum(tiny: Path) -> None:
    """The host reads a segment into another slab, because memory shrank: the bytes between tensors were others."""
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    segments = split_into_segments(component, torch.float32)
    size, largest = sum(one.nbytes for one in segments), max(one.nbytes for one in segments)
    changed = overlaid(component, lambda weight: weight.add_(1), tuple(one.name for one in component.tensors))
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device, budget=max(size // 2, largest * 4))
        host = memory.tiers(there)[1]
        free = [1 << 30]
        host.planner.before_planning = lambda: there.ledger.set_budget(HOST, free[0])
        with there.lease(changed, torch.float32, Use(forward_passes=9)) as lease:
            for _ in range(3):
                for one in component.tensors:
                    with lease.use_tensors([one.name]) as found:
                        found.clear()
                free[0] = largest * 2
                lease.adjust()


@pytest.mark.parametrize("policy", ["first", "auto"])
def test_the_first_copy_with_an_overlay_is_verified(
    policy: Policy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights were copied rightly before. With a new overlay there is no sum to compare the result with later."""
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    changed = overlaid(component, lambda weight: weight.add_(1))
    with simulated(nbytes=1 << 30) as device:
        there = memory.on(device)
        verification = cast("HostSource", there.source).transfers.verification = Verification(policy)
        with there.lease(component, torch.float32):
            pass
        there.drop()
        # Verifying has taken more than its share of the time.
        verification._seconds, verification._work = 1.0, 10.0
        push = device.push
        monkeypatch.setattr(device, "push", lambda given, target: push(given.roll(-64), target))
        with pytest.raises(TransferError), there.lease(changed, torch.float32):
            pass
