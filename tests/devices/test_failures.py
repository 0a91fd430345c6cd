"""Errors of torch that mean that memory ran out or a device is lost are translated; other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from safelight.devices.failures import translate_torch_errors
from safelight.errors import DeviceLostError, OutOfMemoryError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("Invalid buffer size: 9.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_messages_that_mean_no_memory(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^Loading the unet"), translate_torch_errors("Loading the unet", 5):
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("shapes differ"), ValueError("x")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translate_torch_errors("Loading the unet"):
        raise error
    assert caught.value is error


def accelerator_error(code: int, words: str) -> RuntimeError:
    error = torch.AcceleratorError(f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported")
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("code", [700, 710, 719, 214, 999])
def test_an_error_that_ends_the_use_of_cuda_is_a_lost_device(code: int) -> None:
    """After these errors each call fails until the process ends, so the worker must not go on."""
    words = r"cuda is gone \(CUDA error: a broken kernel\);"
    with pytest.raises(DeviceLostError, match=words), translate_torch_errors("Loading the unet"):
        raise accelerator_error(code, "a broken kernel")


def test_other_errors_of_cuda_leave_the_device() -> None:
    with pytest.raises(OutOfMemoryError), translate_torch_errors("Loading the unet"):
        raise accelerator_error(2, "out of memory")
    with pytest.raises(torch.AcceleratorError), translate_torch_errors("Loading the unet"):
        raise accelerator_error(1, "invalid argument")
