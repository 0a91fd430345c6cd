"""What a command or server needs that does not compute: the library. Imports no torch."""

from __future__ import annotations

from safelight.config import Settings
from safelight.library.library import Library


def open_library(settings: Settings) -> Library:
    """The library under the settings' root, which need not exist yet."""
    return Library(settings.root)
