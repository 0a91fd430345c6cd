"""From a client's request to a job: check the request against the model and the server's limits, then queue it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from starlette.requests import Request as HTTPRequest

from safelight.assembly.services import Services
from safelight.catalog.cards import Card, find_card
from safelight.catalog.inputs import DIGEST
from safelight.catalog.model import Model
from safelight.errors import ModelNotFoundError, QueueFullError, RequestError, StorageError
from safelight.queue.job import QueuedJob
from safelight.queue.person import Person
from safelight.request.bounds import MOST_SEED
from safelight.request.input_pictures import pictures_of, with_pictures
from safelight.request.job import Job
from safelight.request.prompts import variants
from safelight.request.schema import Request
from safelight.resolve.limits import RequestLimits
from safelight.resolve.resolve import resolve
from safelight.server import bridge
from safelight.server.problems import RefusedError, found

TROUBLE_SECONDS = 0.5
"""Seconds between two checks of whether the queue waits."""


def some_seed(count: int) -> int:
    """Return a random seed, for a request without one; ``count`` is its number of images."""
    return secrets.randbelow(max(1, MOST_SEED - count))


def model_named(control: Services, name: str) -> Model:
    """Return the model with this name. It must be a name: the server opens no path that a request contains.

    Raises ModelNotFoundError.
    """
    return control.library.get(name)


def default_model(control: Services) -> Model:
    """Return the model for clients that name none (:func:`default_card`)."""
    return model_named(control, default_card(control).name)


def default_card(control: Services) -> Card:
    """Return the card of the model for clients that name none: ``default_model``, else the library's first.

    Models that were read, and whose files are there, come before others.
    Raises ModelNotFoundError when the library is empty or has no model with the configured name.
    """
    library, wanted = control.library, control.settings.default_model
    cards = library.cards()
    if wanted is not None:
        return find_card(cards, library.root, wanted)
    if not cards:
        raise ModelNotFoundError(None, [])
    return next((card for card in cards if card.digest and card.state() == "there"), cards[0])


def request_of(control: Services, fields: Mapping[str, Any]) -> Request:
    """Return a client's request. Without a model it gets the default model, without a seed a random one.

    ``fields``: of a :class:`safelight.request.schema.Request`.
    Raises RequestError, ModelNotFoundError.
    """
    filled = dict(fields)
    filled["model"] = filled["model"] or default_card(control).name
    if filled["seed"] is None:
        filled["seed"] = some_seed(filled["count"])
    return Request(**filled)


@dataclass(frozen=True, slots=True)
class PersonLimits:
    """What a person may ask for; None for no limit.

    ``waiting``: jobs that wait. ``disk``: the size of the person's images and input images, in bytes.
    """

    request: RequestLimits
    waiting: int | None = None
    disk: int | None = None


def limits_of(control: Services, who: Person) -> PersonLimits:
    """Return what this server allows a person."""
    settings = control.settings
    pixels, steps = settings.max_pixels, settings.max_steps
    waiting: int | None = None
    disk: float | None = None
    if who.role == "guest":
        pixels, steps = _lower(pixels, settings.guest_max_pixels), _lower(steps, settings.guest_max_steps)
        waiting, disk = settings.guest_max_waiting, settings.guest_max_disk
    elif who.role == "member":
        waiting, disk = settings.member_max_waiting, settings.member_max_disk
    request = RequestLimits(pixels, steps, settings.max_images, settings.max_prompt_chars)
    return PersonLimits(request, waiting, None if disk is None else int(disk * (1 << 30)))


def _lower(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def accept(
    control: Services, *requests: Request, who: Person, client: str, priority: int = 0, spread: bool = False
) -> list[QueuedJob]:
    """Queue a person's requests, all or none, and return their jobs. Each job uses the content that its model has now.

    A request whose prompts contain choices becomes one job for each image.
    ``spread``: a request for several images becomes one job for each slot, if so many jobs may wait.
    Raises ModelNotFoundError, RequestError or QueueFullError, and RefusedError for the person's limits.
    """
    most = limits_of(control, who)
    if who.role == "guest" and any(request.isolate for request in requests):
        raise RequestError("isolate", True, "a process of its own for each image is for members")
    expanded = [variant for request in requests for variant in _expand(control, request, most.request)]
    # Before the pictures are decoded.
    _check_waiting(control, who, most, len(expanded))
    expanded = _with_stored_pictures(control, who, expanded)
    queue = partial(_queue, control, who, most, client, priority)
    parts = [part for request in expanded for part in _parts(control, request)] if spread else expanded
    if len(parts) > len(expanded):
        with contextlib.suppress(QueueFullError):
            return queue(parts)
    return queue(expanded)


def _queue(
    control: Services, who: Person, most: PersonLimits, client: str, priority: int, requests: Sequence[Request]
) -> list[QueuedJob]:
    jobs = [_resolve(control, request, who, most.request) for request in requests]
    control.database.input_owners.add(who.name, {digest for job in jobs for _, digest in pictures_of(job.request)})
    accept_jobs = control.dispatcher.accept
    return accept_jobs(*jobs, client=client, person=who.name, priority=priority, max_own=most.waiting)


def _check_waiting(control: Services, who: Person, most: PersonLimits, more: int) -> None:
    """Raise QueueFullError if a person would have too many jobs that wait, RefusedError if too many images."""
    if most.waiting is not None and (waiting := control.database.queued(who.name)) + more > most.waiting:
        raise QueueFullError(waiting, most.waiting)
    check_disk(control, who)


def _with_stored_pictures(control: Services, who: Person, requests: Sequence[Request]) -> list[Request]:
    """Return the requests with the digests of their pictures.

    The pictures belong to the person from now on, also if a request is refused: they count as theirs.
    """
    digests: dict[tuple[bool, str], str] = {}

    def store(field: str, given: str) -> str:
        if DIGEST.fullmatch(given):
            return given
        # A mask is decoded in another way.
        key = (field == "mask", given)
        if key not in digests:
            digests[key] = control.catalog.inputs.store_from_request(field, given, by_path=False)
            control.database.input_owners.add(who.name, [digests[key]])
        return digests[key]

    return [with_pictures(request, store) for request in requests]


def _parts(control: Services, request: Request) -> list[Request]:
    """Divide a request for several images into one for each slot that takes jobs. Their images are in order.

    If the slots compute in different ways, on other hardware or in another dtype, the request stays whole.
    """
    ways = [slot.supervisor.run_settings(0.0) for slot in control.dispatcher.slots if slot.takes_jobs]
    parts = max(1, min(request.count, len(ways))) if all(way == ways[0] for way in ways) else 1
    firsts = [request.count * part // parts for part in range(parts + 1)]
    return [request.for_images(first, end - first) for first, end in pairwise(firsts)]


def disk_of(control: Services, person: str) -> int:
    """Return the size of a person's images and of the input images that they sent, in bytes."""
    inputs = control.catalog.inputs.bytes_of(control.database.input_owners.of(person))
    return control.database.images.bytes_of(person) + inputs


def check_disk(control: Services, who: Person) -> None:
    """Raise RefusedError if a person's images and input images take as much as they may."""
    most = limits_of(control, who).disk
    if most is not None and (used := disk_of(control, who.name)) >= most:
        message = f"your images take {used / 1e6:.1f} MB, and at most {most / 1e6:.1f} MB are yours; delete some"
        raise RefusedError(403, "disk_limit", f"{message}. Input images that no image uses are removed after a day")


def store_input(control: Services, who: Person, field: str, data: bytes) -> str:
    """Store a picture that a person sent, and return its digest.

    Raises RequestError if it is no picture, and RefusedError if the person has no room.
    """
    check_disk(control, who)
    digest = control.catalog.inputs.store(field, data)
    control.database.input_owners.add(who.name, [digest])
    return digest


def own_job(control: Services, who: Person, job_id: str) -> QueuedJob:
    """Return a job that the person may see. Raises RefusedError (404) if there is none."""
    job = control.database.job(job_id)
    return found(job if job is not None and who.owns(job.person) else None, "job", job_id)


def own_input(control: Services, who: Person, digest: str) -> str:
    """Return the digest of an input image that the person may see. Raises RefusedError (404) if there is none."""
    stored = control.database.input_owners.may_use(who, digest) and control.catalog.inputs.stored_digest(digest)
    return found(stored or None, "input image", digest)


def wildcards(control: Services) -> Path:
    """Return the folder with the wildcards of prompts."""
    return control.settings.root / "wildcards"


def _expand(control: Services, request: Request, allowed: RequestLimits) -> list[Request]:
    """Make the choices in the request's prompts; return one request for each image.

    The limits come first, because they bound this work.
    """
    allowed.check_texts(request)
    allowed.check_count(request)
    return variants.make_choices(request, wildcards(control))


def _resolve(control: Services, request: Request, who: Person, allowed: RequestLimits) -> Job:
    model = model_named(control, request.model)
    for field, given in pictures_of(request):
        if DIGEST.fullmatch(given) and not control.database.input_owners.may_use(who, given):
            raise RequestError(field, given, "is no input image of yours; send the picture")
    request = replace(request, isolate=request.isolate or control.settings.isolate)
    return resolve(request, control.catalog, allowed, by_path=False, model=model)


async def ended(control: Services, job: QueuedJob, http: HTTPRequest) -> QueuedJob:
    """Wait until the job has ended, and return it. When the client disconnects, cancel the job.

    Raises RefusedError when the client disconnects, or when the queue cannot continue.
    """
    waiting = asyncio.ensure_future(bridge.ended(control.database, control.events, job.id))
    gone = asyncio.ensure_future(_wait_for_disconnect(http))
    stuck = asyncio.ensure_future(_wait_for_trouble(control))
    try:
        await asyncio.wait((waiting, gone, stuck), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if stuck.done():
            raise RefusedError(507, "storage", f"the queue waits: {stuck.result()}")
        raise RefusedError(400, "gone", "the client closed the connection")
    finally:
        gone.cancel()
        stuck.cancel()
        if not waiting.done():
            waiting.cancel()
            await cancel(control, job)


async def all_ended(control: Services, jobs: list[QueuedJob], http: HTTPRequest) -> list[QueuedJob]:
    """Wait until all jobs have ended, and return them: see :func:`ended`."""
    try:
        return [await ended(control, job, http) for job in jobs]
    finally:
        for job in jobs:
            # This does not change a job that has ended.
            await cancel(control, job)


async def cancel(control: Services, job: QueuedJob) -> None:
    """Cancel a job for which no client waits. A full disk prevents this; then the worker makes its images anyway."""
    with contextlib.suppress(StorageError):
        await bridge.run(control.dispatcher.cancel, job.id)


async def _wait_for_trouble(control: Services) -> str:
    """Wait until the queue cannot continue, and return the reason."""
    while not control.dispatcher.trouble:
        await asyncio.sleep(TROUBLE_SECONDS)
    return control.dispatcher.trouble


async def _wait_for_disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
