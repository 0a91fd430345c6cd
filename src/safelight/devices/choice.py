"""Which device computes, in which dtype, with how much memory for models. Decided once per process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from safelight.devices import machine
from safelight.devices.base import Device
from safelight.devices.cpu import CPU
from safelight.devices.cuda import CUDA
from safelight.devices.mps import MPS
from safelight.errors import SettingError
from safelight.request.run_settings import Precision


def device(wanted: str) -> Device:
    """The device named, or for ``auto`` CUDA, then MPS, then the CPU. Raises SettingError when it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
        "simulated": True,
    }
    if wanted == "auto":
        wanted = next(name for name, present in there.items() if present)
    if not there.get(wanted, False):
        raise SettingError(
            "device",
            wanted,
            "--device, SAFELIGHT_DEVICE or the file of settings",
            "this machine has no such device, or torch cannot use it",
        )
    return _MADE[wanted]()


def _simulated() -> Device:
    # It registers a backend with torch, which only those should pay who ask for it.
    from safelight.devices.simulated import Simulated

    return Simulated()


_MADE: Mapping[str, Callable[[], Device]] = {"cpu": CPU, "cuda": CUDA, "mps": MPS, "simulated": _simulated}


def hardware(on: Device) -> str:
    """What computes, so far as it can change a result: the chip, its driver, on a Mac the system's build."""
    if on.name == "cuda":
        major, minor = torch.cuda.get_device_capability(on.torch)
        said = (torch.cuda.get_device_name(on.torch), f"compute {major}.{minor}", f"CUDA {torch.version.cuda}")
        driver = machine.nvidia_driver() or str(_cuda_driver())
        return ", ".join([*said, f"driver {driver}", f"cuDNN {torch.backends.cudnn.version()}"])
    limits = [f"{name}={os.environ[name]}" for name in _ISA_LIMITS if os.environ.get(name)]
    known = [machine.processor(), torch.backends.cpu.get_cpu_capability(), machine.system(), *limits]
    return ", ".join(part for part in known if part)


def _cuda_driver() -> int:
    """What NVIDIA's driver says of itself where the kernel's file is not there, such as 13000 for CUDA 13.0."""
    version: Callable[[], int] = torch._C._cuda_getDriverVersion  # pyright: ignore[reportAttributeAccessIssue]
    return version()


_ISA_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that make libraries use fewer instructions than the processor has, and with them other roundings."""


def precision(wanted: Precision, on: Device) -> str:
    """The dtype for text encoders and UNet: fp32 on a CPU; elsewhere bf16 or fp16, whichever computes rightly there."""
    if wanted != "auto":
        return wanted
    if on.name == "cpu":
        return "fp32"
    return next((name for name in ("bf16", "fp16") if computes(name, on.torch)), "fp32")


def native_bf16() -> bool:
    """Whether this processor has instructions for bf16, as oneDNN says; without them bf16 is slower than fp32."""
    supported: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(supported())


def slow(dtype: str, on: str) -> str:
    """What is to be said of a dtype for which the device has no instructions, "" where it has."""
    if on == "cpu" and dtype == "bf16" and not native_bf16():
        return "this processor has no bf16 instructions: --precision bf16 is several times slower than fp32 here"
    return ""


def computes(name: str, on: torch.device) -> bool:
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
