"""Opens the library, for commands that do not compute. Imports no torch, and little else."""

from __future__ import annotations

from safelight.catalog.library import Library
from safelight.settings import Settings


def open_library(settings: Settings) -> Library:
    """Open the library under the settings' root. The root need not exist yet."""
    return Library(settings.root)
