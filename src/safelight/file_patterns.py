"""Patterns for the names of picture files."""

from __future__ import annotations

import string

DEFAULT = "{model}-{seed}"

FIELDS = ("date", "time", "model", "seed", "prompt", "width", "height", "steps", "sampler")
"""``date``: 2026-11-28. ``time``: 14-03-22. ``prompt``: its first words."""


def check_pattern(pattern: str) -> str:
    """Return the pattern. Raises ValueError, with the reason, if it cannot name a file in the output folder."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"is no pattern ({error})") from error
    for _, field, spec, conversion in parts:
        if field is not None and (field not in FIELDS or spec or conversion):
            raise ValueError(f"has the field {{{field}}}; these exist: {', '.join(FIELDS)}")
    folders = pattern.split("/")
    if any(part in ("", ".", "..") for part in folders) or "\\" in pattern:
        raise ValueError("must name a file in the output folder, such as {date}/{model}-{seed}")
    return pattern
