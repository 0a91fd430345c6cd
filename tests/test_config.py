"""Settings: where they come from, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safelight import config
from safelight.devices import choice
from safelight.errors import SettingError


def test_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load().root == root
    assert config.load(tmp_path).root == tmp_path
    monkeypatch.delenv("SAFELIGHT_ROOT")
    assert config.load().root.name == "safelight"


@pytest.mark.parametrize(
    ("name", "value"),
    [("THREADS", "0"), ("MAX_CACHE_RAM_GB", "-1"), ("PRECISION", "fp8"), ("DEVICE", "tpu"), ("ATTENTION_TYPE", "x")],
)
def test_wrong_values_name_their_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SAFELIGHT_{name}", value)
    with pytest.raises(SettingError, match=f"SAFELIGHT_{name}"):
        config.load()


def test_devices() -> None:
    assert choice.device("cpu").torch == torch.device("cpu")
    assert choice.device("simulated").separate
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(SettingError, match="no such device"):
        choice.device(absent)


def test_precision_is_tried_before_it_is_chosen() -> None:
    cpu = choice.device("cpu")
    assert choice.precision("auto", cpu) == "fp32"
    assert choice.precision("bf16", cpu) == "bf16"
    assert choice.computes("bf16", cpu.torch)
    assert choice.computes("fp16", cpu.torch)
