"""What the server and its worker say to each other, through a pipe that only they have. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safelight.request.results import Image, Progress
from safelight.request.schema import Request

Question = Literal["memory", "prefetch", "load", "unload", "pin", "unpin"]


@dataclass(frozen=True, slots=True)
class Open:
    """To a worker that has imported everything: open an engine with these settings, and hold the models of these
    names."""

    settings: Any
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generate:
    """Make the images of a request with the content ``digest``, from its image ``first`` on. ``upcoming``: the names of
    models that will be wanted next."""

    job: str
    request: Request
    digest: str
    first: int
    upcoming: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop that job at its next step."""

    job: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A question that is answered while a job may run: ``tag`` comes back with the answer.

    ``memory``: what is where; ``prefetch``: bring the model as far as there is room; ``load``: bring it, others may go;
    ``unload``: drop what nobody holds of the model's digest (empty: of all); ``pin``: bring it and hold it, ``unpin``:
    hold it no longer.
    """

    tag: int
    what: Question
    model: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """From a worker: everything is imported."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a worker: the engine is open. ``run``: its run settings."""

    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a job is."""

    job: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Made:
    """An image of a job is finished. ``place`` counts from 0 within the job."""

    job: str
    place: int
    image: Image


@dataclass(frozen=True, slots=True)
class Ended:
    """A job ended: ``problem`` says why it failed, ``kind`` of which sort. ``resident``: the digests of models that are
    in memory now, the last used first."""

    job: str
    kind: Literal["done", "cancelled", "input", "failed", "device"]
    problem: str
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """To a question: ``value``, or the ``problem``."""

    tag: int
    value: Any
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Working:
    """From an isolated process: the job has begun in the process ``pid``, which SIGUSR1 stops at its next step."""

    pid: int


ToWorker = Open | Generate | Cancel | Ask
FromWorker = Imported | Ready | Progressed | Made | Ended | Answer | Working
