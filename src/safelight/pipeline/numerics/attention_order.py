"""The order in which torch tries its own attention kernels on a GPU.

Torch chooses this order at a process's first attention on a GPU, and then overwrites what was set before: on some GPUs
it puts cuDNN first. So the first image of a process was computed by another kernel than all later ones, although both
were asked for the same (row ATTENTION 10 of ``docs/corruption.md``). The source is ``priority_order`` in
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from safelight.devices.failures import translate_torch_errors

_C: Any = torch._C

_BUILD: list[int] = _C._get_sdp_priority_order() if hasattr(_C, "_get_sdp_priority_order") else []
"""Torch's order, read at import, because it depends on the build."""

_CUDNN = 3
"""cuDNN's number among torch's kernels (``SDPBackend``)."""

_CUDNN_FIRST = ((9, 0), (10, 0))
"""Compute capabilities on which torch prefers cuDNN's kernel, because it is the fastest there: Hopper and Blackwell."""

_LEAST_TORCH = (2, 11)
_LEAST_CUDNN = 9_15_01
"""Older versions of torch do not prefer cuDNN, and cuDNN's older versions had errors."""

DEPRIORITIZED, PREFERRED = "TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_PREFERRED"
"""Torch's variables against cuDNN: the first if it is set, the second if it is 0."""


def read(device: torch.device | None) -> list[int]:
    """Return the present order. Lets torch choose first, so that it does not do so during a job.

    ``device``: where the job computes. Other GPUs of the process are not touched.
    """
    if device is not None and device.type == "cuda":
        let_torch_choose(device)
    return _C._get_sdp_priority_order()


@cache
def let_torch_choose(device: torch.device) -> None:
    """Compute attention on a GPU, once per process. Raises OutOfMemoryError or DeviceLostError."""
    with translate_torch_errors("Computing attention"):
        small = torch.zeros(1, 1, 8, 8, dtype=torch.float16, device=device)
        F.scaled_dot_product_attention(small, small, small)


def wanted(device: torch.device | None) -> list[int]:
    """Return the order that a job needs: on a GPU the one that torch chooses by itself, whatever the host has set."""
    return [_CUDNN, *(kernel for kernel in _BUILD if kernel != _CUDNN)] if _prefers_cudnn(device) else _BUILD


def _prefers_cudnn(device: torch.device | None) -> bool:
    if device is None or device.type != "cuda" or os.environ.get(DEPRIORITIZED) or os.environ.get(PREFERRED) == "0":
        return False
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return (
        version >= _LEAST_TORCH
        and (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN
        and torch.cuda.get_device_capability(device) in _CUDNN_FIRST
    )
