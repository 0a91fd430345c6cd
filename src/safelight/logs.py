"""Where messages go: to the standard error, so that what a script reads on the standard output stays clean."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

Format = Literal["plain", "json"]


def to_stderr(form: Format = "plain") -> None:
    """For commands and processes of their own; a program that uses Safelight as a library decides by itself.

    ``json``: an object to a line, for whatever collects logs.
    """
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False),
    ]
    structlog.configure(
        processors=processors,
        # Asked for at every message, as whoever runs a command in this process may have put another in its place.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
