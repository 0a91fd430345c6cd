"""One setting of the process's numeric state: its getter, its setter, and the value that a job needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NumericSetting:
    """One setting of the state.

    ``wanted``: the value that a job needs, or a function that computes it from the present value.
    ``lacks``: functions that this torch does not have. A job then neither reads nor writes the setting;
    :func:`record` lists it.
    ``required``: a job fails if ``lacks`` is not empty.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    wanted: Any
    lacks: tuple[str, ...] = ()
    required: bool = False

    def wanted_value(self, found: object) -> Any:
        return self.wanted(found) if callable(self.wanted) else self.wanted

    def put(self, value: object) -> None:
        """Write ``value`` unless the state has it already.

        Raises RuntimeError if the setter fails. Some setters raise although they set the value; that is not a failure.
        """
        if self.read() == value:
            return
        try:
            self.write(value)
        except Exception as error:
            if self.read() != value:
                raise RuntimeError(f"numerics: {self.name} cannot be set to {value!r}") from error
