"""The names that people may have."""

from __future__ import annotations

import re

from safelight.errors import InputError

NAME = r"^[\w@]$|^[\w@][\w .@-]{0,62}[\w@.-]$"
"""Letters and digits of any script, ``_``, ``@``, ``.`` and ``-``; spaces within."""


def check_name(name: str) -> str:
    """Return a person's name. Raises InputError if a person may not be named so."""
    if not re.fullmatch(NAME, name):
        raise InputError(f"a person may not be named {name!r}: up to 64 letters, digits, spaces and any of _ @ . -")
    return name
