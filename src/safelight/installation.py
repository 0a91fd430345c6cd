"""Where the environments of an installation are, and which one is active (see :mod:`safelight.trust.environment`).

It imports nothing but the standard library. The files that it reads have the same form in every version, since the
version that was installed first starts all later ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = "safelight-environments"
"""Within the environment into which the user installed Safelight."""

ACTIVE = "active.json"

FIRST = "first"
"""The name of the environment into which the user installed Safelight."""


@dataclass(frozen=True, slots=True)
class State:
    """The names of the environment that the command runs, and of the one that it ran before; "" for none. ``gone``:
    the name of one that should run and is not there any more."""

    active: str = FIRST
    before: str = ""
    gone: str = ""


def first(prefix: Path) -> Path:
    """The environment into which the user installed Safelight, from any of its environments."""
    return prefix.parent.parent if prefix.parent.name == FOLDER else prefix


def folder(home: Path, name: str) -> Path:
    """The folder of the environment ``name`` of the installation ``home``."""
    return home if name == FIRST else home / FOLDER / name


def state(home: Path) -> State:
    """What ``active.json`` of the installation ``home`` says. The first environment is active when the file is not
    there or cannot be read, and when the active environment is gone."""
    try:
        values = json.loads((home / FOLDER / ACTIVE).read_text())
        active, before = str(values["active"]), str(values["before"])
    except (OSError, ValueError, KeyError, TypeError):
        return State()
    if not python_of(folder(home, active)).exists():
        return State(gone=active)
    return State(active, before if python_of(folder(home, before)).exists() else "")


def python_of(prefix: Path) -> Path:
    """The interpreter of an environment."""
    return prefix / "bin" / "python"
