"""A job: one accepted request and its state. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from safelight.errors import DeviceLostError, InputError, SafelightError, StorageError, WorkerDiedError
from safelight.request.job import Job
from safelight.request.schema import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]

Failure = Literal["", "input", "failed", "device", "storage", "worker"]
"""The kind of a job's failure.

``""``: the job has not failed.
``input``: the request asks for something that is not allowed.
``failed``: any cause that has no kind of its own.
``device``: the device is gone.
``storage``: a disk is full or cannot be written.
``worker``: the worker died.
"""

FAILURES: Mapping[Failure, type[SafelightError]] = {
    # It is an InputError, too.
    "storage": StorageError,
    "input": InputError,
    "device": DeviceLostError,
    "worker": WorkerDiedError,
    "failed": SafelightError,
}
"""The class of the errors behind each kind of failure. The first that fits an error is the error's kind."""


def failure_of(error: SafelightError) -> Failure:
    """Return the kind of failure of a job that ended by ``error``."""
    return next(kind for kind, errors in FAILURES.items() if isinstance(error, errors))


ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

ATTEMPTS = 2
"""How often a job may start. A job whose worker died starts again in a new worker: an earlier job may be the cause."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """One accepted request and its state. Times are seconds since 1970.

    ``number``: the order of arrival.
    ``model_digest``: the digest of the model when the server accepted the job; if the model's content has changed
    since, the job fails.
    ``job``: the resolved request. None for a job stored by schema version 1; it is resolved when it starts.
    ``client``: the client that sent the request.
    ``person``: the person whose request it is; "" if the server does not know people.
    ``slot``: the slot that ran it last; "" if none did.
    ``overtaken``: the number of later jobs of the same person that started before this one.
    ``delayed``: the seconds for which those later jobs computed while this one waited.
    ``attempts``: how often the job was started.
    ``images``: the number of its images that are stored.
    ``reason``: why the job failed, or why the queue chose it.
    ``failure``: the kind of the failure, empty unless the job failed.
    ``unreadable``: why this version cannot read the stored request; ``request`` is then only a stand-in.
    """

    id: str
    number: int
    request: Request
    model_digest: str
    job: Job | None
    client: str
    created: float
    person: str = ""
    slot: str = ""
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
        """The jobs with the same group need the same weights: no switch is needed between them."""
        return self.model_digest
