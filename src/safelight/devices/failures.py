"""Translates torch's errors to Safelight's."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator

import torch

from safelight.errors import DeviceLostError, OutOfMemoryError

_HINT = "Make the image smaller, close other programs, or lower max_cache_ram_gb to leave more memory for computing."


_PHRASES = (
    "can't allocate memory",
    "out of memory",
    "can't start new thread",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "Invalid buffer size",
)
"""Found in messages of the CPU's allocator, CUDA, Python's threads, cuBLAS and cuDNN, cuDNN 9, cuBLAS when it has no
memory for its handle, and MPS, in this order."""


LOST = frozenset({46, 100, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911, 999})
"""CUDA's error codes (``cudaError_t``) after which every further call of the process fails.

- NVIDIA's reference says of them that "to continue using CUDA, the process must be terminated and relaunched": 226
  (contained), 700 (illegal address), 702 (launch timeout), 710 (assert), 714 (hardware stack), 715 (illegal
  instruction), 716 (misaligned address), 717 (address space), 718 (program counter), 719 (launch failure), 721 (tensor
  memory leak) and 911 (external device).
- Hardware that failed or is gone: 46 (devices unavailable), 100 (no device), 214 (ECC), 220 (NVLink), 709 (context
  destroyed), and 999 (unknown), which a GPU gives that fell off the bus or did not wake up after suspend.
"""


def is_lost(error: BaseException) -> bool:
    """Whether the error says that the process cannot use its device any more. torch stores CUDA's code in the error."""
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) in LOST


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory is used up. Some of torch's allocators have no error class of their own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


@contextlib.contextmanager
def translate_torch_errors(subject: str, needed: int = 0) -> Generator[None]:
    """Within the context, translate the errors of the system and of torch that have a class of Safelight's.

    Out of memory: OutOfMemoryError. A lost device: DeviceLostError.

    ``subject``: the subject of the message, such as "Loading the unet".
    ``needed``: bytes that were requested, 0 if unknown.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if is_lost(error):
            raise DeviceLostError("cuda", str(error).partition("\n")[0]) from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(subject, needed, None, _HINT) from error
