"""The library's lock: whoever writes records holds it, other processes too."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock

from safelight.errors import UnreadableFileError


@contextlib.contextmanager
def alone(root: Path) -> Generator[None]:
    """Hold the lock of the library under ``root``, which is made if it is not there. Raises UnreadableFileError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock", timeout=60):
            yield
    except OSError as error:
        raise UnreadableFileError(root, f"cannot be written: {error.strerror or error}") from error
