"""One piece of the process's numeric state: how it is read, how it is written, what a job wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of state. ``wanted`` may be a function of what was found. ``lacks``: names that this torch is without;
    such a row is neither read nor written, and is named in :func:`record`, or, if ``required``, refused.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    wanted: Any
    lacks: tuple[str, ...] = ()
    required: bool = False

    def aim(self, found: object) -> Any:
        return self.wanted(found) if callable(self.wanted) else self.wanted

    def put(self, value: object) -> None:
        """Writes ``value`` unless it is there. Some setters complain although they have set: that is no failure."""
        if self.read() == value:
            return
        try:
            self.write(value)
        except Exception as error:
            if self.read() != value:
                raise RuntimeError(f"numerics: {self.name} cannot be set to {value!r}") from error
