"""Combinations of versions, systems and devices that are known to spoil images, each with its row of the corpus."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

from safelight.request.run_settings import RunSettings
from safelight.trust.finding import Finding


@dataclass(frozen=True, slots=True)
class Advisory:
    """``device`` and ``system`` (as :func:`platform.system` says), empty for any; torch from ``first`` to before
    ``fixed`` (None: not fixed); ``row`` of the corpus; what goes wrong, and what to do."""

    device: str
    system: str
    first: tuple[int, int]
    fixed: tuple[int, int] | None
    row: str
    problem: str
    todo: str


ADVISORIES = (
    Advisory(
        "mps", "Darwin", (2, 0), None, "COPY 08",
        "copies of 4 GiB and more, and strided copies, have arrived corrupted (pytorch 124335, 189961)",
        "Safelight copies in smaller, contiguous pieces and sums what arrived; leave verify_transfers on.",
    ),
    Advisory(
        "mps", "Darwin", (2, 4), (2, 6), "ATTENTION 01",
        "sliced attention has returned junk (InvokeAI 7049)",
        "The kernel is tried before it is used; attention_type: torch-sdp or normal.",
    ),
    Advisory(
        "mps", "Darwin", (2, 0), None, "COPY 01",
        "asynchronous copies have read memory that was freed (pytorch 139550)",
        "Copies wait unless this machine's self-test shows the others to be sound.",
    ),
    Advisory(
        "cuda", "", (2, 5), (2, 10), "ATTENTION 02",
        "scaled dot-product attention has been wrong for inputs that are not contiguous (pytorch 163597)",
        "The kernel is tried with such inputs before it is used.",
    ),
)  # fmt: skip


def advisories(run: RunSettings) -> Iterator[Finding]:
    """Those that fit this machine, as findings that are no failures: what Safelight does about each is said."""
    version = tuple(int(part) for part in run.versions["torch"].split("+")[0].split(".")[:2])
    for advisory in ADVISORIES:
        fits = advisory.device == run.device and advisory.system in ("", platform.system())
        if fits and advisory.first <= version and (advisory.fixed is None or version < advisory.fixed):
            what = f"known of torch {run.versions['torch']} on {run.device} ({advisory.row})"
            yield Finding("device", what, True, advisory.problem, advisory.todo)
