"""Translates torch's errors to Safelight's."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from safelight.errors import OutOfMemoryError

_HINT = "Make the image smaller, close other programs, or lower max_cache_ram_gb to leave more memory for computing."


_PHRASES = (
    "can't allocate memory",
    "out of memory",
    "can't start new thread",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "Invalid buffer size",
)
"""Found in messages of the CPU's allocator, CUDA, Python's threads, cuBLAS and cuDNN, cuDNN 9, and MPS, in this
order."""


@contextlib.contextmanager
def translate_memory_errors(subject: str, needed: int = 0) -> Generator[None]:
    """Within the context, translate every out-of-memory error of the system and of torch to OutOfMemoryError.

    ``subject``: the subject of the message, such as "Loading the unet".
    ``needed``: bytes that were requested, 0 if unknown.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(subject, needed, None, _HINT) from error
    except OSError as error:
        if error.errno != 12:
            raise
        raise OutOfMemoryError(subject, needed, None, _HINT) from error
    except RuntimeError as error:
        # The CPU allocator has no error class of its own, so the message decides.
        if not any(phrase in str(error) for phrase in _PHRASES):
            raise
        raise OutOfMemoryError(subject, needed, None, _HINT) from error
