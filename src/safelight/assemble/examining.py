"""Everything wired for the doctor: an engine, and canaries that are made in processes of their own."""

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
    """A doctor of an engine of its own with those settings."""
    fresh = Fresh(WORKER, settings.model_copy(update={"canary": "off"}))
    engine = opening.open_engine(settings)
    try:
        yield Doctor(engine, Canaries(settings.root, fresh.made))
    finally:
        engine.close()
        fresh.close()
