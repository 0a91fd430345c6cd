"""The library's lock. Every process holds it while it writes records."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock

from safelight.errors import UnreadableFileError


@contextlib.contextmanager
def library_lock(root: Path) -> Generator[None]:
    """Hold the lock of the library under ``root``. Creates the folder if needed.

    Raises UnreadableFileError when the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock", timeout=60):
            yield
    except OSError as error:
        raise UnreadableFileError(root, f"cannot be written: {error.strerror or error}") from error
