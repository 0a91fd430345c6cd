"""What happens in a server, told to whoever listens: jobs, progress, images, memory, workers. No torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["job", "progress", "image", "removed", "memory", "worker"]


@dataclass(frozen=True, slots=True)
class Event:
    """``data`` is made of plain values. ``job``: its identifier, empty where it is about none."""

    kind: Kind
    job: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


Listener = Callable[[Event], None]
"""Called in the thread in which something happened; must return at once."""


class Events:
    """Tells all listeners. Safe to be used by several threads."""

    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._changes = 0

    @property
    def changes(self) -> int:
        """How often a job or an image changed: who remembers it knows whether to look again."""
        return self._changes

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """The function that is returned ends it."""
        with self._lock:
            number = next(self._numbers)
            self._listeners[number] = listener

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return unsubscribe

    def tell(self, event: Event) -> None:
        with self._lock:
            listeners = list(self._listeners.values())
            self._changes += event.kind in ("job", "image", "removed")
        for listener in listeners:
            listener(event)
