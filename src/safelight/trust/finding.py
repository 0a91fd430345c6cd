"""A finding: what was looked at, and whether it is as it must be. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Suspect = Literal["loading", "state", "attention", "memory", "device"]
SUSPECTS: tuple[Suspect, ...] = ("loading", "state", "attention", "memory", "device")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``what`` was looked at, the ``evidence``, and what to do (``todo``) when it is not ``ok``."""

    suspect: Suspect
    what: str
    ok: bool
    evidence: str
    todo: str = ""
