"""From a client's request to a job: check the request against the model and the server's limits, then queue it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request as HTTPRequest

from safelight.assembly.services import Services
from safelight.catalog.cards import Card, find_card
from safelight.catalog.model import Model
from safelight.errors import ModelNotFoundError, StorageError
from safelight.queue.job import QueuedJob
from safelight.request.bounds import MOST_SEED
from safelight.request.job import Job
from safelight.request.prompts import variants
from safelight.request.schema import Request
from safelight.resolve.limits import RequestLimits
from safelight.resolve.resolve import resolve
from safelight.server import bridge
from safelight.server.problems import RefusedError

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


def limits(control: Services) -> RequestLimits:
    """Return what this server allows."""
    settings = control.settings
    return RequestLimits(settings.max_pixels, settings.max_steps, settings.max_images, settings.max_prompt_chars)


def accept(control: Services, *requests: Request, client: str, priority: int = 0) -> list[QueuedJob]:
    """Queue requests, all or none, and return their jobs. Each job uses the content that its model has now.

    A request whose prompts contain choices becomes one job for each image.
    Raises ModelNotFoundError, RequestError or QueueFullError.
    """
    return control.dispatcher.accept(
        *(_resolve(control, variant) for request in requests for variant in _expand(control, request)),
        client=client,
        priority=priority,
    )


def wildcards(control: Services) -> Path:
    """Return the folder with the wildcards of prompts."""
    return control.settings.root / "wildcards"


def _expand(control: Services, request: Request) -> list[Request]:
    """Make the choices in the request's prompts; return one request for each image.

    The limits come first, because they bound this work.
    """
    allowed = limits(control)
    allowed.check_texts(request)
    allowed.check_count(request)
    return variants.make_choices(request, wildcards(control))


def _resolve(control: Services, request: Request) -> Job:
    model = model_named(control, request.model)
    request = replace(request, isolate=request.isolate or control.settings.isolate)
    return resolve(request, control.catalog, limits(control), by_path=False, model=model)


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
