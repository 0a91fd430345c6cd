"""Sends log messages to standard error, so that standard output has only results, which scripts read."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

Format = Literal["plain", "json"]


def to_stderr(form: Format = "plain") -> None:
    """Send log messages to standard error. Only Safelight's own commands and processes call this: a program that uses
    Safelight as a library configures its own logs.

    ``form``: ``plain`` text, or ``json`` for one object per line.
    """
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
