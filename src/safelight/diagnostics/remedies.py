"""Suggests settings that have repaired images more than once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safelight.devices import measurements
from safelight.diagnostics.finding import Finding, Suspect
from safelight.pipeline.repair import COUNTS_FILE, SETTINGS

OFTEN = 2


def suggestions(root: Path) -> Iterator[Finding]:
    """Yield a finding for each repair that helped at least :data:`OFTEN` times."""
    for helped, values in measurements.everything(root / COUNTS_FILE).items():
        times = values.get("times", 0)
        if times < OFTEN:
            continue
        suspect = values.get("suspect")
        setting = SETTINGS.get(str(suspect))
        todo = f"`safelight config set {setting}`" if setting else "If it continues, report it with `--save FILE`."
        evidence = f"{times} images were repaired ({helped}). Last problem: {values.get('last')}"
        of: Suspect = suspect if suspect in ("loading", "state", "attention", "memory") else "device"
        yield Finding(of, "repairs so far", True, evidence, todo)
