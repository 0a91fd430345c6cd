"""Opening an engine: the import of everything that computes, which is most of a command's start."""

from __future__ import annotations

import gc
from types import ModuleType
from typing import TYPE_CHECKING

from safelight.config import Settings

if TYPE_CHECKING:
    from safelight.engine.local import LocalEngine


def imported() -> ModuleType:
    """:mod:`safelight.assemble.worker`, imported.

    Garbage is not collected while torch, diffusers and transformers are imported, and what they made is not looked at
    again: nothing of it is garbage, and looking takes a sixth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        from safelight.assemble import worker

        gc.freeze()
    finally:
        if collects:
            gc.enable()
    return worker


def open_engine(settings: Settings, previews: bool = False) -> LocalEngine:
    """The engine of this process, see :func:`safelight.assemble.worker.open_engine`."""
    return imported().open_engine(settings, previews=previews)
