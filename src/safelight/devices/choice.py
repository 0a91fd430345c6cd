"""Which device computes, in which dtype, with how much memory for models. Decided once per process."""

from __future__ import annotations

import torch

from safelight.errors import SettingError
from safelight.types import Precision


def device(wanted: str) -> torch.device:
    """The device named, or for ``auto`` CUDA, then MPS, then the CPU. Raises SettingError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, present in there.items() if present)
    if not there.get(wanted, False):
        raise SettingError("device", wanted, "settings", "this machine has no such device, or torch cannot use it")
    return torch.device(wanted)


def precision(wanted: Precision, on: torch.device) -> str:
    """The dtype for text encoders and UNet: fp32 on a CPU; elsewhere bf16 or fp16, whichever computes rightly there."""
    if wanted != "auto":
        return wanted
    if on.type == "cpu":
        return "fp32"
    return next((name for name in ("bf16", "fp16") if _computes(name, on)), "fp32")


def _computes(name: str, on: torch.device) -> bool:
    """Whether a matrix product in this dtype comes within its rounding of the same in float64."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    try:
        got = (a.to(on) @ b.to(on)).cpu().double()
    except RuntimeError:
        return False
    return bool((got - exact).abs().max() < 64 * torch.finfo(dtype).eps * exact.abs().max())
