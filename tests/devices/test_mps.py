"""The arithmetic of the memory of Apple GPUs. It needs no such GPU."""

from __future__ import annotations

import pytest
import torch

from safelight.devices import machine
from safelight.devices.mps import MPS


@pytest.mark.parametrize(
    ("share", "free", "available"),
    [
        (None, 900, 700),  # The driver recommends 1000, and tensors use 300.
        ("1.7", 900, 700),
        ("0.0", 900, 700),
        ("0.5", 900, 200),
        ("0.2", 900, 0),
        (None, 100, 250),  # The system has 100, and torch's cache has 150.
    ],
)
def test_torch_can_use_its_cache_again(
    share: str | None, free: int, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, nbytes in {"current_allocated": 300, "driver_allocated": 450, "recommended_max": 1000}.items():
        monkeypatch.setattr(torch.mps, f"{name}_memory", lambda nbytes=nbytes: nbytes)
    monkeypatch.setattr(machine, "tightest_limit", lambda: machine.MemoryLimit(free, "a test"))
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    if share is not None:
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", share)
    assert MPS().available() == available
