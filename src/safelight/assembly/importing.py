"""Opens an engine. First it imports everything that computes, which takes most of the time of a command's start."""

from __future__ import annotations

import gc
import random
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from safelight.assembly.lean_imports import lean_imports
from safelight.settings import Settings

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine


def import_engine(own_process: bool = True) -> ModuleType:
    """Import :mod:`safelight.assembly.engine` and return it.

    own_process: the process is Safelight's own, and not a host process that uses Safelight as a library.

    In a process of its own, the garbage collector is off while torch, diffusers and transformers are imported. It never
    examines their objects: none is garbage, and examining them takes a sixth of the time. These libraries log errors
    only. Parts of libraries that Safelight does not use are not imported (:func:`lean_imports`). In a host process, the
    import changes no state.
    """
    if not own_process:
        # During their import, libraries draw random numbers and add warning filters.
        random_state = random.getstate()
        with warnings.catch_warnings():
            from safelight.assembly import engine as engine_module

        random.setstate(random_state)
        return engine_module
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with lean_imports():
            from safelight.assembly import engine as engine_module
            from safelight.boundary import quiet
        quiet()
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
    return engine_module


def open_engine(settings: Settings, previews: bool = False, own_process: bool = True) -> LocalEngine:
    """Open the engine of this process, see :func:`safelight.assembly.engine.open_engine` and :func:`import_engine`."""
    return import_engine(own_process).open_engine(settings, previews=previews)
