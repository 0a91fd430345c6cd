"""What of the CUDA device needs no GPU."""

from __future__ import annotations

import pytest
import torch

from safelight.devices import cuda


@pytest.mark.parametrize(("variable", "size"), [(":4096:8", 32 << 20), (":4096:2:16:8", (8 << 20) + (128 << 10))])
def test_an_older_torch_says_the_size_of_a_workspace_by_its_variable(
    variable: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", variable)
    monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size", raising=False)
    assert cuda._workspace_bytes() == size


def test_a_newer_torch_says_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cublas_workspace_size", lambda: 5, raising=False)
    assert cuda._workspace_bytes() == 5
