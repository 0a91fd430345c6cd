"""Wires the doctor: an engine of its own, and canaries that fresh processes make."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from safelight.assemble import opening
from safelight.assemble.serving import WORKER
from safelight.engine.fresh import Fresh
from safelight.settings import Settings
from safelight.trust.canary import Canaries
from safelight.trust.doctor import Doctor


@contextmanager
def doctor(settings: Settings) -> Generator[Doctor]:
    """Open a doctor with an engine of its own. Closes the engine at the end of the context."""
    engine = opening.open_engine(settings)
    fresh = Fresh(WORKER, settings.model_copy(update={"canary": "off"}), engine.catalog)
    try:
        yield Doctor(engine, Canaries(settings.root, fresh.made))
    finally:
        engine.close()
        fresh.close()
