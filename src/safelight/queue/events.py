"""Events of a server, sent to its listeners: jobs, progress, images, memory, workers. No torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from safelight.queue.person import Role

Kind = Literal[
    "job",
    "progress",
    "image",
    "images",
    "boards",
    "presets",
    "memory",
    "worker",
    "download",
    "models",
    "doctor",
    "compacting",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    ``job``: the job's identifier, empty if the event concerns no job.
    ``data``: plain values.
    ``person``: whose job or image it is; None if it concerns everyone.
    ``role``: the least role that may hear it.
    """

    kind: Kind
    job: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    person: str | None = None
    role: Role = "guest"


Listener = Callable[[Event], None]
"""Called in the thread that sends the event; must return at once."""


class Events:
    """Sends each event to all listeners. Thread-safe."""

    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener. Returns a function that removes it."""
        with self._lock:
            number = next(self._numbers)
            self._listeners[number] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return unsubscribe

    def tell(self, event: Event) -> None:
        """Call every listener with the event."""
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener(event)
