"""Every message of torch that means that memory ran out is translated; other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from safelight.devices.failures import translate_memory_errors
from safelight.errors import OutOfMemoryError


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
    with pytest.raises(OutOfMemoryError, match=r"^Loading the unet"), translate_memory_errors("Loading the unet", 5):
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("shapes differ"), ValueError("x")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translate_memory_errors("Loading the unet"):
        raise error
    assert caught.value is error
