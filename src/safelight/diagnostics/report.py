"""The doctor's report: findings in the order of the usual suspects, and the most likely cause."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from safelight.catalog.model import Model
from safelight.diagnostics.finding import SUSPECTS, Finding

A_THEN_A = "the same image twice"
SWITCHED = "the same image after other models"
ADAPTED = "the same image after adapters"
GROWN = "the process's memory over switches"
SYMPTOMS = (A_THEN_A, SWITCHED, ADAPTED, GROWN)
"""Symptoms that can come from wrong bytes, broken kernels or leftover state alike."""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and a description of the machine."""

    findings: tuple[Finding, ...]
    machine: dict[str, str]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def cause(self) -> str:
        """The suspect whose finding explains the others best; empty if all findings are ok.

        Direct evidence comes before symptoms: wrong bytes explain a wrong image, but not the other way round.
        """
        wrong = [finding for finding in self.findings if not finding.ok]
        direct = [finding for finding in wrong if finding.what not in SYMPTOMS]
        if direct:
            return direct[0].suspect
        return min(wrong, key=lambda finding: SYMPTOMS.index(finding.what)).suspect if wrong else ""

    def values(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "ok": self.ok,
            "cause": self.cause,
            "machine": self.machine,
            "findings": [asdict(finding) for finding in self.findings],
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings by the order of the suspects."""
    return tuple(sorted(findings, key=lambda finding: SUSPECTS.index(finding.suspect)))


def without_names(report: Report, models: Sequence[Model]) -> Report:
    """Return the report without the models' names and paths, so that a user can send it to others."""

    def bare(text: str) -> str:
        for number, model in enumerate(models, 1):
            text = text.replace(str(model.path), f"(file {number})").replace(model.name, f"(model {number})")
        return text

    bared = tuple(replace(f, what=bare(f.what), evidence=bare(f.evidence), todo=bare(f.todo)) for f in report.findings)
    return Report(bared, report.machine)
