"""Finds the environments of an installation, and the active one (see :mod:`safelight.diagnostics.environment`).

This module imports only the standard library. The files that it reads have the same form in every version, because the
version that was installed first starts all later versions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = "safelight-environments"
"""The folder of later environments, in the environment into which the user installed Safelight."""

ACTIVE = "active.json"

FIRST = "first"
"""The name of the environment into which the user installed Safelight."""


@dataclass(frozen=True, slots=True)
class ActiveEnvironment:
    """Which environment the command runs.

    ``active``: name of the environment that the command runs.
    ``before``: name of the environment that it ran before; "" if there is none.
    ``gone``: name of the environment that should be active but no longer exists; "" if there is none.
    """

    active: str = FIRST
    before: str = ""
    gone: str = ""


def first(prefix: Path) -> Path:
    """Return the environment into which the user installed Safelight, given any of its environments."""
    return prefix.parent.parent if prefix.parent.name == FOLDER else prefix


def folder(home: Path, name: str) -> Path:
    """Return the folder of the environment ``name`` in the installation ``home``."""
    return home if name == FIRST else home / FOLDER / name


def state(home: Path) -> ActiveEnvironment:
    """Read ``active.json`` of the installation ``home``.

    The first environment is active if the file is missing or unreadable, or if the active environment is gone.
    """
    try:
        values = json.loads((home / FOLDER / ACTIVE).read_text())
        active, before = str(values["active"]), str(values["before"])
    except (OSError, ValueError, KeyError, TypeError):
        return ActiveEnvironment()
    if not python_of(folder(home, active)).exists():
        return ActiveEnvironment(gone=active)
    return ActiveEnvironment(active, before if python_of(folder(home, before)).exists() else "")


def python_of(prefix: Path) -> Path:
    """Return the path of an environment's interpreter."""
    return prefix / "bin" / "python"
