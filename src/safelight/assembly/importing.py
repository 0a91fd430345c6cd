"""Opens an engine. First it imports everything that computes, which takes most of the time of a command's start."""

from __future__ import annotations

import gc
import random
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from safelight.settings import Settings

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine


def imported(ours: bool = True) -> ModuleType:
    """Import :mod:`safelight.assembly.engine` and return it.

    ours: the process is Safelight's own. Then the garbage collector is off while torch, diffusers and transformers are
    imported, and never examines their objects (none is garbage, and examining them takes a sixth of the time); and
    these libraries log errors only. Otherwise Safelight is a library in a host process, whose state stays the same.
    """
    if not ours:
        # During their import, libraries draw random numbers and add warning filters.
        random_state = random.getstate()
        with warnings.catch_warnings():
            from safelight.assembly import engine as worker

        random.setstate(random_state)
        return worker
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        from safelight.assembly import engine as worker
        from safelight.boundary import quiet

        quiet()
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
    return worker


def open_engine(settings: Settings, previews: bool = False, ours: bool = True) -> LocalEngine:
    """Open the engine of this process, see :func:`safelight.assembly.engine.open_engine` and :func:`imported`."""
    return imported(ours).open_engine(settings, previews=previews)
