"""The messages between the server and its worker, which a private pipe carries. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safelight.queue.job import Failure
from safelight.request.job import Job
from safelight.request.results import Image, Progress
from safelight.request.schema import Request

Command = Literal["memory", "fits", "prefetch", "load", "unload", "pin", "unpin"]


@dataclass(frozen=True, slots=True)
class Open:
    """Server to a worker that has imported everything: open an engine with ``settings`` and pin the models named in
    ``pinned``."""

    settings: Any
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generate:
    """Server to worker: make the images of a job.

    job_id: the identifier that all messages about the job repeat.
    first: the first image to make, counted from 0; the server has stored the earlier ones.
    upcoming: the names of the models of the next jobs.
    """

    job_id: str
    job: Job
    first: int
    upcoming: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Server to worker: stop the job at its next step."""

    job_id: str


@dataclass(frozen=True, slots=True)
class RunCommand:
    """Server to worker: a command. The worker replies to it even while a job runs. The reply repeats ``tag``.

    ``command`` is one of:
    ``memory``: report the memory of each place.
    ``fits``: report whether the model fits in memory for ``request``, and how.
    ``prefetch``: load the model into free memory; evict nothing.
    ``load``: load the model; evict other models if necessary.
    ``unload``: evict what no lease holds of the model with the digest ``model`` (empty: of all models).
    ``pin``: load the model and keep it in memory.
    ``unpin``: end the pin.
    """

    tag: int
    command: Command
    model: str = ""
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """Worker to server: everything is imported."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to server: the engine is open. ``run_settings``: those of the engine."""

    run_settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Progressed:
    """Worker to server: the progress of a job."""

    job_id: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Made:
    """Worker to server: an image of a job is finished. ``index``: its number within the job, from 0."""

    job_id: str
    index: int
    image: Image


@dataclass(frozen=True, slots=True)
class Ended:
    """Worker to server: a job ended.

    kind: how it ended: done, cancelled, or the kind of its failure.
    problem: the reason of a failure, else empty.
    resident: the digests of the models in memory, the most recently used first.
    memory: the worker's memory, see :meth:`safelight.workers.local_engine.LocalEngine.memory`; None if it is unknown.
    """

    job_id: str
    kind: Literal["done", "cancelled"] | Failure
    problem: str
    resident: tuple[str, ...]
    memory: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Worker to server: the reply to a call: its ``value``, or the ``problem`` if the command failed."""

    tag: int
    value: Any
    problem: str = ""


@dataclass(frozen=True, slots=True)
class JobStarted:
    """Isolated process to server: process ``pid`` has begun the job. SIGUSR1 stops it at its next step."""

    pid: int


ToWorker = Open | Generate | Cancel | RunCommand
FromWorker = Imported | Ready | Progressed | Made | Ended | Reply | JobStarted
