"""Opening an engine: the import of everything that computes, which is most of a command's start."""

from __future__ import annotations

import gc
import random
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from safelight.settings import Settings

if TYPE_CHECKING:
    from safelight.engine.local import LocalEngine


def imported(ours: bool = True) -> ModuleType:
    """:mod:`safelight.assemble.worker`, imported.

    In a process of ``ours`` garbage is not collected while torch, diffusers and transformers are imported, what they
    made is not looked at again (nothing of it is garbage, and looking takes a sixth of the time), and the libraries say
    errors only. A host that uses Safelight as a library is left as it was.
    """
    if not ours:
        # Libraries draw random numbers and add filters of warnings while they are imported.
        drawn = random.getstate()
        with warnings.catch_warnings():
            from safelight.assemble import worker

        random.setstate(drawn)
        return worker
    collects = gc.isenabled()
    gc.disable()
    try:
        from safelight.arch.diffusers_fence import quiet
        from safelight.assemble import worker

        quiet()
        gc.freeze()
    finally:
        if collects:
            gc.enable()
    return worker


def open_engine(settings: Settings, previews: bool = False, ours: bool = True) -> LocalEngine:
    """The engine of this process, see :func:`safelight.assemble.worker.open_engine` and :func:`imported`."""
    return imported(ours).open_engine(settings, previews=previews)
