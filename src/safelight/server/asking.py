"""From a client's request to a job: check the request against the model and the server's limits, then queue it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import replace
from pathlib import Path

from starlette.requests import Request as HTTPRequest

from safelight.assemble.serving import Services
from safelight.errors import ModelNotFoundError, RequestError, StorageError
from safelight.generate.check import check, within_pixels
from safelight.jobs.job import Job
from safelight.library.chosen import settled
from safelight.library.model import Model
from safelight.prompts import variants
from safelight.request.schema import MOST_SEED, Request
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
    """Return the model for clients that name none: ``default_model``, else the library's first.

    Raises ModelNotFoundError when the library is empty or has no model with the configured name.
    """
    wanted = control.settings.default_model
    if wanted is not None:
        return model_named(control, wanted)
    cards = control.library.cards()
    if not cards:
        raise ModelNotFoundError("(any)", [])
    return model_named(control, cards[0].name)


def within_limits(control: Services, request: Request, model: Model) -> None:
    """Raise RequestError when a request has more pixels, steps or images than this server allows."""
    settings = control.settings
    part = request.image and request.mask_padding is not None
    within_pixels(request, model, settings.max_pixels, control.shelves.inputs.size(request.image) if part else None)
    for field, value, most, name in (
        ("steps", request.steps, settings.max_steps, "max_steps"),
        ("hires_steps", request.hires_steps, settings.max_steps, "max_steps"),
        ("count", request.count, settings.max_images, "max_images"),
    ):
        if value > most:
            raise RequestError(field, value, f"this server allows at most {most} ({name})")


def texts_within_limits(control: Services, request: Request) -> None:
    """Raise RequestError when a prompt is longer than this server allows."""
    settings = control.settings
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        if len(text) > settings.max_prompt_chars:
            problem = f"this server allows at most {settings.max_prompt_chars} characters (max_prompt_chars)"
            raise RequestError(field, f"{text[:20]}…", problem)


def accept(control: Services, *requests: Request, client: str, priority: int = 0) -> list[Job]:
    """Queue requests, all or none, and return their jobs. Each job uses the content that its model has now.

    A request whose prompts contain choices becomes one job for each image.
    Raises ModelNotFoundError, RequestError or QueueFullError.
    """
    return control.dispatcher.accept(
        *(_check(control, variant) for request in requests for variant in _expand(control, request)),
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
    texts_within_limits(control, request)
    if request.count > control.settings.max_images:
        problem = f"this server allows at most {control.settings.max_images} (max_images)"
        raise RequestError("count", request.count, problem)
    return variants.chosen(request, wildcards(control))


def _check(control: Services, request: Request) -> tuple[Request, str]:
    model = model_named(control, request.model)
    request = replace(request, model=model.name, isolate=request.isolate or control.settings.isolate)
    # A wildcard may have replaced a word by a longer text.
    texts_within_limits(control, request)
    resolved = settled(request, model, control.shelves, by_path=False)
    request = resolved.request
    within_limits(control, request, model)
    check(request, model, resolved.words)
    return request, model.digest


async def ended(control: Services, job: Job, http: HTTPRequest) -> Job:
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
            await _cancel(control, job)


async def all_ended(control: Services, jobs: list[Job], http: HTTPRequest) -> list[Job]:
    """Wait until all jobs have ended, and return them: see :func:`ended`."""
    try:
        return [await ended(control, job, http) for job in jobs]
    finally:
        for job in jobs:
            # This does not change a job that has ended.
            await _cancel(control, job)


async def _cancel(control: Services, job: Job) -> None:
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
