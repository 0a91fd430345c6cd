"""Events of a server, sent to its listeners: jobs, progress, images, memory, workers. No torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

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

KINDS: tuple[Kind, ...] = get_args(Kind)


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
        self._listeners: dict[int, tuple[Listener, Collection[Kind]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def subscribe(self, listener: Listener, kinds: Collection[Kind] = KINDS) -> Callable[[], None]:
        """Add a listener for events of these kinds. Returns a function that removes it."""
        with self._lock:
            number = next(self._numbers)
            self._listeners[number] = listener, kinds

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return unsubscribe

    def anybody_hears(self, kind: Kind) -> bool:
        """Return whether there is a listener for events of this kind. If not, the event need not be built."""
        with self._lock:
            return any(kind in kinds for _, kinds in self._listeners.values())

    def tell(self, event: Event) -> None:
        """Call every listener for events of its kind."""
        with self._lock:
            listeners = [listener for listener, kinds in self._listeners.values() if event.kind in kinds]
        for listener in listeners:
            listener(event)
