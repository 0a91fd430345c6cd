"""Known bugs that spoil images on some combinations of versions, systems and devices.

Each has its row in ``docs/corruption.md``.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

from safelight.diagnostics.finding import Finding
from safelight.request.run_settings import RunSettings


@dataclass(frozen=True, slots=True)
class Advisory:
    """A known bug.

    ``device``, ``system``: where it occurs; empty for any. ``system`` is a value of :func:`platform.system`.
    ``first``: (major, minor) of the first torch version with the bug.
    ``fixed``: (major, minor) of the first version without it; None if no version is fixed.
    ``row``: its row in ``docs/corruption.md``.
    ``problem``: what goes wrong. ``todo``: what Safelight does, and what the user can do.
    """

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
        "Safelight copies in smaller, contiguous pieces and checks the result; leave verify_transfers on.",
    ),
    Advisory(
        "mps", "Darwin", (2, 4), (2, 6), "ATTENTION 01",
        "sliced attention has returned junk (InvokeAI 7049)",
        "Safelight tests the kernel before it uses it. Set attention_type to torch-sdp or normal.",
    ),
    Advisory(
        "mps", "Darwin", (2, 0), None, "COPY 01",
        "asynchronous copies have read memory that was freed (pytorch 139550)",
        "Safelight copies synchronously unless asynchronous copies pass its self-test on this machine.",
    ),
    Advisory(
        "cuda", "", (2, 5), (2, 10), "ATTENTION 02",
        "scaled dot-product attention has been wrong for inputs that are not contiguous (pytorch 163597)",
        "Safelight tests the kernel with such inputs before it uses it.",
    ),
)  # fmt: skip


def advisories(run: RunSettings) -> Iterator[Finding]:
    """Yield the known bugs of this machine as findings that are not failures. Each says what Safelight does."""
    version = tuple(int(part) for part in run.versions["torch"].split("+")[0].split(".")[:2])
    for advisory in ADVISORIES:
        fits = advisory.device == run.device and advisory.system in ("", platform.system())
        if fits and advisory.first <= version and (advisory.fixed is None or version < advisory.fixed):
            what = f"known bug of torch {run.versions['torch']} on {run.device} ({advisory.row})"
            yield Finding("device", what, True, advisory.problem, advisory.todo)
