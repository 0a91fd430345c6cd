"""What a slot needs of its worker, wherever the worker is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from safelight.request.schema import Request
from safelight.workers.messages import Command, FromWorker, Generate


class SlotSupervisor(Protocol):
    """The methods of :class:`safelight.workers.supervisor.Supervisor`, which others have, too."""

    restarts: int
    """How often the worker was replaced."""

    @property
    def problem(self) -> str:
        """Why the slot takes no jobs; "" if it does."""
        raise NotImplementedError

    @property
    def machine(self) -> str:
        """The machine of the worker; "" for the server's own."""
        raise NotImplementedError

    @property
    def pinned(self) -> tuple[str, ...]:
        """The names of the pinned models."""
        raise NotImplementedError

    def run_settings(self, timeout: float) -> Mapping[str, Any] | None:
        """The worker's run settings; None when it is not ready within ``timeout`` seconds."""
        raise NotImplementedError

    def spare_is_ready(self, timeout: float = 0.0) -> bool:
        """Whether a spare is ready."""
        raise NotImplementedError

    def run(self, generate: Generate, cancelled: Callable[[], bool] = ...) -> Generator[FromWorker]:
        """Run a job, and yield the worker's messages about it; the last one is Ended."""
        raise NotImplementedError

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is running."""
        raise NotImplementedError

    def ask(self, command: Command, model: str = "", request: Request | None = None) -> Future[Any]:
        """Send the worker a command."""
        raise NotImplementedError

    def kill(self) -> None:
        """Replace the worker."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes."""
        raise NotImplementedError
