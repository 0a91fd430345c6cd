"""Chooses the device and the dtype, once per process, and describes the hardware."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from safelight.devices import machine
from safelight.devices.base import Device
from safelight.devices.cpu import CPU
from safelight.devices.cuda import CUDA
from safelight.devices.failures import is_lost, is_out_of_memory
from safelight.devices.mps import MPS
from safelight.errors import SettingError
from safelight.extensions import Extensible, extensions, function
from safelight.request.run_settings import Precision


def device(wanted: str) -> Device:
    """Return the device named ``wanted``. ``auto``: CUDA, then MPS, then the CPU. Raises SettingError if missing."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
        "simulated": True,
    }
    if wanted == "auto":
        wanted = next(name for name, present in available.items() if present)
    if wanted not in available and wanted in DEVICES:
        return _of_package(wanted)
    if not available.get(wanted, False):
        raise SettingError(
            "device",
            wanted,
            "--device, SAFELIGHT_DEVICE or the file of settings",
            "this machine has no such device, or torch cannot use it",
        )
    return _BUILTIN[wanted]()


def _simulated() -> Device:
    # The import registers a backend with torch, so it happens only if this device is used.
    from safelight.devices.simulated import Simulated

    return Simulated()


GROUP = "safelight.devices"
_BUILTIN: Mapping[str, Callable[[], Device]] = {"cpu": CPU, "cuda": CUDA, "mps": MPS, "simulated": _simulated}
DEVICES: Extensible[Callable[[], Device]] = Extensible(_BUILTIN, GROUP, function)
"""Creates each device, by its name."""


def _of_package(name: str) -> Device:
    """Create the device of an installed package. Raises ExtensionError if that fails or it has another name."""
    make = DEVICES[name]
    try:
        made = make()
        if made.name != name:
            raise ValueError(f"made a device named {made.name!r}; its name must be {name!r}")
    except Exception as error:
        raise extensions(GROUP).error(name, error) from error
    return made


def hardware(device: Device) -> str:
    """Describe the hardware as far as it can change a result: the chip, its driver, on a Mac the system's build.

    A GPU's noise and schedules are computed by the processor, so both are named.
    """
    if device.name == "cuda":
        major, minor = torch.cuda.get_device_capability(device.torch)
        facts = (torch.cuda.get_device_name(device.torch), f"compute {major}.{minor}", f"CUDA {torch.version.cuda}")
        driver = machine.nvidia_driver() or str(_cuda_driver())
        return ", ".join([*facts, f"driver {driver}", f"cuDNN {torch.backends.cudnn.version()}", _processor()])
    return _processor()


def _processor() -> str:
    limits = [f"{name}={os.environ[name]}" for name in _ISA_LIMITS if os.environ.get(name)]
    known = [machine.processor(), torch.backends.cpu.get_cpu_capability(), machine.system(), *limits]
    return ", ".join(part for part in known if part)


def _cuda_driver() -> int:
    """The driver's own version number, such as 13000 for CUDA 13.0. It is used if the kernel's file is missing."""
    version: Callable[[], int] = torch._C._cuda_getDriverVersion  # pyright: ignore[reportAttributeAccessIssue]
    return version()


_ISA_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that restrict libraries to older instruction sets. This changes how results are rounded."""


def precision(wanted: Precision, device: Device) -> str:
    """Return the dtype for text encoders and UNet.

    ``auto`` is fp32 on a CPU. On other devices it is the first of bf16, fp16 and fp32 that computes correctly.
    """
    if wanted != "auto":
        return wanted
    if device.name == "cpu":
        return "fp32"
    names = ("bf16", "fp16") if _has_bf16(device) else ("fp16",)
    return next((name for name in names if computes_correctly(name, device.torch)), "fp32")


def _has_bf16(device: Device) -> bool:
    """Whether bf16 may be chosen. GPUs of NVIDIA before Ampere only emulate it, more slowly than fp32."""
    if device.name != "cuda":
        return True
    with torch.cuda.device(device.torch):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def native_bf16() -> bool:
    """Whether oneDNN finds bf16 instructions on this processor. Without them bf16 is slower than fp32."""
    return native_on_cpu(torch.bfloat16)


def native_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in a dtype of 16 bits on this processor. Not if torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported: Mapping[torch.dtype, Callable[[], bool]] = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())


def slowness_warning(dtype: str, device_name: str) -> str:
    """Return a warning if the device has no instructions for the dtype, else ""."""
    if device_name == "cpu" and dtype == "bf16" and not native_bf16():
        return "this processor has no bf16 instructions: --precision bf16 is several times slower than fp32 here"
    return ""


def computes_correctly(name: str, device: torch.device) -> bool:
    """Whether a matrix product in this dtype equals the float64 result up to rounding.

    Raises torch's error if the device has no free memory or is lost. Then the result says nothing about the dtype.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    try:
        got = (a.to(device) @ b.to(device)).cpu().double()
    except RuntimeError as error:
        if is_lost(error) or is_out_of_memory(error):
            raise
        return False
    return bool((got - exact).abs().max() < 64 * torch.finfo(dtype).eps * exact.abs().max())
