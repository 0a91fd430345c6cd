"""What a command needs that does not compute: the library. Imports no torch, and little else."""

from __future__ import annotations

from safelight.library.library import Library
from safelight.settings import Settings


def open_library(settings: Settings) -> Library:
    """The library under the settings' root, which need not exist yet."""
    return Library(settings.root)
