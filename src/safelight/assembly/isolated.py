"""Wires what makes images in isolated processes. No torch, and nothing of the server."""

from __future__ import annotations

from safelight.assembly.programs import WORKER, ZYGOTE
from safelight.settings import Settings
from safelight.workers.isolation import ForkingRunner, IsolatedRunner, SpawningRunner, forks


def open_isolated_runner(settings: Settings) -> IsolatedRunner:
    """The object that runs jobs in isolated processes: by forks or, where the platform forbids them, new processes."""
    return ForkingRunner(ZYGOTE, settings) if forks() else SpawningRunner(WORKER, settings)
