"""What a device can be trusted with is tried on it, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safelight.devices import selftest, sums
from safelight.devices.simulated import Faults, Simulated, simulated
from safelight.devices.transfer import Transfers

pytestmark = pytest.mark.usefixtures("as_for_users")


def test_sound_copies_may_be_asynchronous() -> None:
    with simulated(nbytes=1 << 28) as device:
        found = selftest.run_test(device)
        assert found.asynchronous
        assert device.asynchronous
        assert found.stage_bytes in selftest.BUFFER_SIZES
        assert device.allocated() == device.cached_bytes == 0


@pytest.mark.parametrize(
    "faults",
    [Faults(early_frees=1), Faults(lost_waits=1000), Faults(corrupt_above=1 << 20, corrupted=1)],
    ids=["a freed source", "lost waits", "a large copy"],
)
def test_copy_01_what_went_wrong_once_is_never_asynchronous(faults: Faults) -> None:
    with simulated(nbytes=1 << 28, latency=0.002, faults=faults) as device:
        found = selftest.run_test(device)
        assert not found.asynchronous
        assert not device.asynchronous
        assert "arrived corrupted" in found.why


def test_copy_07_the_synchronous_path_is_run_too() -> None:
    with simulated(nbytes=1 << 24, latency=0.001) as device:
        device.asynchronous = False
        device.faults.early_frees = 5
        source = torch.arange(1 << 20, dtype=torch.int64).view(torch.uint8)
        target = device.allocate(source.numel())
        Transfers(device).push("a pattern", source, target)
        assert sums.compute_sum(target) == sums.compute_sum(source)
        assert device.faults.early_frees == 5


def test_slow_starts_ask_for_larger_buffers() -> None:
    """Each copy waits 2 ms before it begins: large buffers are better, and the test must see it."""
    with simulated(nbytes=1 << 28, latency=0.002) as slow:
        assert selftest.run_test(slow).stage_bytes > min(selftest.BUFFER_SIZES)


def test_it_is_tried_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    original = selftest.run_test

    def counted(device: Simulated) -> selftest.CopyTestResult:
        tries.append(device.name)
        return original(device)

    monkeypatch.setattr(selftest, "run_test", counted)
    with simulated(nbytes=1 << 24) as device:
        first = selftest.copy_test_result(device, tmp_path)
        device.asynchronous = False
        assert selftest.copy_test_result(device, tmp_path) == first
        assert device.asynchronous == first.asynchronous
        assert len(tries) == 1
        (key,) = json.loads((tmp_path / "devices.json").read_text())
        assert torch.__version__ in key
        (tmp_path / "devices.json").write_text("{")
        selftest.copy_test_result(device, tmp_path)
        assert len(tries) == 2
