"""Log messages. Those of Safelight's own processes go to standard error: standard output has only results.

structlog is imported for the first message, because its import takes longer than some commands.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

Format = Literal["plain", "json"]

_waiting: list[Format] = []
"""The format that was asked for before structlog was imported."""


class Log:
    """Writes log messages.

    ``name``: of the module that writes them.
    Each method takes a sentence, and values by name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **values: Any) -> None:
        self._structlog().debug(event, **values)

    def info(self, event: str, **values: Any) -> None:
        self._structlog().info(event, **values)

    def warning(self, event: str, **values: Any) -> None:
        self._structlog().warning(event, **values)

    def error(self, event: str, **values: Any) -> None:
        self._structlog().error(event, **values)

    def exception(self, event: str, **values: Any) -> None:
        """Write an error with the traceback of the current exception."""
        self._structlog().exception(event, **values)

    def _structlog(self) -> Any:
        import structlog

        if _waiting:
            _configure(_waiting.pop())
        return structlog.get_logger(self._name)


def to_stderr(form: Format = "plain") -> None:
    """Send log messages to standard error. Only Safelight's own commands and processes call this: a program that uses
    Safelight as a library configures its own logs.

    ``form``: ``plain`` text, or ``json`` for one object per line.
    """
    if "structlog" in sys.modules:
        _configure(form)
    else:
        _waiting[:] = [form]


def _configure(form: Format) -> None:
    import structlog

    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False),
    ]
    structlog.configure(
        processors=processors,
        # sys.stderr is read for every message, because the caller of a command may have replaced it in this process.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
