"""torch's errors, translated to Safelight's."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from safelight.errors import OutOfMemoryError

_HINT = (
    "Make the image smaller, close other programs, or lower max_cache_ram_gb so that models leave more to computing."
)


_PHRASES = ("can't allocate memory", "out of memory", "can't start new thread", "ALLOC_FAILED")
"""In messages of the CPU's allocator, of CUDA, of Python's threads, of cuBLAS and cuDNN."""


@contextlib.contextmanager
def translated(what: str, needed: int = 0) -> Generator[None]:
    """Raise OutOfMemoryError for every way in which memory can run out within: the system's, and torch's.

    ``needed``: bytes that were asked for, 0 when that is not known.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(what, needed, 0, _HINT) from error
    except OSError as error:
        if error.errno != 12:
            raise
        raise OutOfMemoryError(what, needed, 0, _HINT) from error
    except RuntimeError as error:
        # The allocator for the CPU raises no class of its own.
        if not any(phrase in str(error) for phrase in _PHRASES):
            raise
        raise OutOfMemoryError(what, needed, 0, _HINT) from error
