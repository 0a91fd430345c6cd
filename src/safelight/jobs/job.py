"""A job: one request that was accepted, and what became of it. No torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safelight.request.schema import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]

Failure = Literal["", "input", "failed", "device", "storage", "worker"]
"""What a job failed by: what was asked for; something else; a device that is gone; a full disk; a worker that died."""

ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

ATTEMPTS = 2
"""A job whose worker died is tried once more, in a fresh one: it may have been the other's fault."""


@dataclass(frozen=True, slots=True)
class Job:
    """``number``: order of arrival. ``model_digest``: the content that the request's model named when it was accepted;
    the job is made with that or fails. ``client``: who asked. Times are seconds since 1970.

    ``overtaken``: how many later jobs were started before it; ``delayed``: seconds for which they computed meanwhile.
    ``unreadable``: why this version cannot read its request, of which ``request`` then is only a stand-in.
    ``failure``: of which kind, where it failed. ``attempts``: how often it was started. ``images``: how many of its
    images are stored. ``reason``: why it failed or was chosen when it was.
    """

    id: str
    number: int
    request: Request
    model_digest: str
    client: str
    created: float
    state: State = "queued"
    priority: int = 0
    overtaken: int = 0
    delayed: float = 0.0
    attempts: int = 0
    images: int = 0
    started: float | None = None
    ended: float | None = None
    reason: str = ""
    failure: Failure = ""
    unreadable: str = ""

    @property
    def group(self) -> str:
        """Jobs of one group need the same weights, so that nothing is switched between them."""
        return self.model_digest
