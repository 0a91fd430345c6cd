"""What the doctor says: findings, in the order of the usual suspects, and the cause that explains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from safelight.library.model import Model
from safelight.trust.finding import SUSPECTS, Finding

A_THEN_A = "the same image twice"
SWITCHED = "the same image after other models"
ADAPTED = "the same image after adapters"
GROWN = "the process's memory over switches"
SYMPTOMS = (A_THEN_A, SWITCHED, ADAPTED, GROWN)
"""What wrong bytes, kernels and leftovers all lead to."""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings. ``cause``: the suspect whose finding explains the others best; empty when all is right."""

    findings: tuple[Finding, ...]
    machine: dict[str, str]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def cause(self) -> str:
        """Direct evidence goes before symptoms: bytes that are wrong explain an image that is wrong, not conversely."""
        wrong = [finding for finding in self.findings if not finding.ok]
        direct = [finding for finding in wrong if finding.what not in SYMPTOMS]
        if direct:
            return direct[0].suspect
        return min(wrong, key=lambda finding: SYMPTOMS.index(finding.what)).suspect if wrong else ""

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "ok": self.ok,
            "cause": self.cause,
            "machine": self.machine,
            "findings": [asdict(finding) for finding in self.findings],
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings in the order of the suspects."""
    return tuple(sorted(findings, key=lambda finding: SUSPECTS.index(finding.suspect)))


def without_names(report: Report, models: Sequence[Model]) -> Report:
    """The report with the models' names and paths left out, for whoever is sent it."""

    def bare(text: str) -> str:
        for number, model in enumerate(models, 1):
            text = text.replace(str(model.path), f"(file {number})").replace(model.name, f"(model {number})")
        return text

    bared = tuple(replace(f, what=bare(f.what), evidence=bare(f.evidence), todo=bare(f.todo)) for f in report.findings)
    return Report(bared, report.machine)
