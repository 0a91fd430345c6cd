"""The order in which torch tries its own attention kernels on a GPU.

Torch chooses this order at a process's first attention on a GPU, and then overwrites what was set before: on some GPUs
it puts cuDNN first. So the first image of a process was computed by another kernel than all later ones, although both
were asked for the same (row ATTENTION 10 of ``docs/corruption.md``). The source is ``priority_order`` in
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

_C: Any = torch._C

_BUILD: list[int] = _C._get_sdp_priority_order() if hasattr(_C, "_get_sdp_priority_order") else []
"""Torch's order, read at import, because it depends on the build."""

_CUDNN = 3
"""cuDNN's number among torch's kernels (``SDPBackend``)."""

_CUDNN_FIRST = ((9, 0), (10, 0))
"""Compute capabilities on which cuDNN's kernel is the fastest: Hopper and Blackwell, as in torch 2.10 and later."""

_LEAST_CUDNN = 9_15_01
"""Torch does not prefer older versions of cuDNN, because they had errors."""


def read() -> list[int]:
    """Return the present order. Before, torch has made its own choice, so that it does not make it during a job."""
    if torch.cuda.is_initialized():
        # Without free memory, a job on the GPU fails; one on the CPU of a program that has filled its GPU does not.
        with suppress(torch.OutOfMemoryError):
            let_torch_choose()
    return _C._get_sdp_priority_order()


@cache
def let_torch_choose() -> None:
    """Compute attention on the GPU, once per process."""
    small = torch.zeros(1, 1, 8, 8, dtype=torch.float16, device="cuda")
    F.scaled_dot_product_attention(small, small, small)


def wanted(_found: object) -> list[int]:
    """Return the order that a job needs on the current GPU: the one that torch chooses, whatever the host has set."""
    if not torch.cuda.is_initialized() or torch.cuda.get_device_capability() not in _CUDNN_FIRST:
        return _BUILD
    if (torch.backends.cudnn.version() or 0) < _LEAST_CUDNN:
        return _BUILD
    return [_CUDNN, *(kernel for kernel in _BUILD if kernel != _CUDNN)]
