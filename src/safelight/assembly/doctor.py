"""Wires the doctor: an engine of its own, and canaries that fresh processes make."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from safelight.assembly import importing
from safelight.assembly.programs import WORKER
from safelight.diagnostics.canary import Canaries
from safelight.diagnostics.doctor import Doctor
from safelight.settings import Settings
from safelight.workers.fresh_process import FreshProcesses


@contextmanager
def doctor(settings: Settings) -> Generator[Doctor]:
    """Open a doctor with an engine of its own. Closes the engine at the end of the context."""
    engine = importing.open_engine(settings)
    fresh = FreshProcesses(WORKER, settings.model_copy(update={"canary": "off"}), engine.catalog)
    try:
        yield Doctor(engine, Canaries(settings.root, fresh.make_first_image))
    finally:
        engine.close()
        fresh.close()
