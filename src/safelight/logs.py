"""Where warnings go: to the standard error, so that what a script reads on the standard output stays clean."""

from __future__ import annotations

import logging
import sys

import structlog


def to_stderr() -> None:
    """For commands and processes of their own; a program that uses Safelight as a library decides by itself."""
    structlog.configure(
        # Asked for at every message, as whoever runs a command in this process may have put another in its place.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
