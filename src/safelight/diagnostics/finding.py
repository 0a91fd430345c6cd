"""A finding: the result of one check. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Suspect = Literal["loading", "state", "attention", "memory", "device"]
SUSPECTS: tuple[Suspect, ...] = ("loading", "state", "attention", "memory", "device")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    ``suspect``: the suspect that the check is about.
    ``what``: what was checked.
    ``ok``: whether it is as it must be.
    ``evidence``: what the check saw.
    ``todo``: what to do if it is not ok.
    """

    suspect: Suspect
    what: str
    ok: bool
    evidence: str
    todo: str = ""
