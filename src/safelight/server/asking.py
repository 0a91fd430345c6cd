"""From what a client asks to a job: checked by the model's record and the server's limits, before it is queued."""

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
"""Between two looks at whether the queue waits."""


def some_seed(count: int) -> int:
    """A seed for who gives none."""
    return secrets.randbelow(max(1, MOST_SEED - count))


def model_named(control: Services, name: str) -> Model:
    """The model of that name; names only, as no path from a request is opened. Raises ModelNotFoundError."""
    return control.library.get(name)


def default_model(control: Services) -> Model:
    """For clients that name none. Raises ModelNotFoundError when the library is empty."""
    wanted = control.settings.default_model
    if wanted is not None:
        return model_named(control, wanted)
    cards = control.library.cards()
    if not cards:
        raise ModelNotFoundError("(any)", [])
    return model_named(control, cards[0].name)


def within_limits(control: Services, request: Request, model: Model) -> None:
    """Raise RequestError for more than this server takes."""
    settings = control.settings
    part = request.image and request.mask_padding is not None
    within_pixels(request, model, settings.max_pixels, control.shelves.inputs.size(request.image) if part else None)
    for field, value, most, name in (
        ("steps", request.steps, settings.max_steps, "max_steps"),
        ("hires_steps", request.hires_steps, settings.max_steps, "max_steps"),
        ("count", request.count, settings.max_images, "max_images"),
    ):
        if value > most:
            raise RequestError(field, value, f"this server takes at most {most} ({name})")


def texts_within_limits(control: Services, request: Request) -> None:
    """Raise RequestError for longer prompts than this server reads."""
    settings = control.settings
    for field, text in (("prompt", request.prompt), ("negative", request.negative)):
        if len(text) > settings.max_prompt_chars:
            problem = f"this server takes at most {settings.max_prompt_chars} characters (max_prompt_chars)"
            raise RequestError(field, f"{text[:20]}…", problem)


def accept(control: Services, *requests: Request, client: str, priority: int = 0) -> list[Job]:
    """Queue requests, each pinned to the content that its model has now: all, or none. One whose prompts have choices
    becomes one for each image.

    Raises ModelNotFoundError, RequestError, QueueFullError.
    """
    return control.dispatcher.accept(
        *(_checked(control, one) for request in requests for one in _chosen(control, request)),
        client=client,
        priority=priority,
    )


def wildcards(control: Services) -> Path:
    """Where a prompt's wildcards are."""
    return control.settings.root / "wildcards"


def _chosen(control: Services, request: Request) -> list[Request]:
    """What is to be chosen in its prompts chosen, after what bounds the work that this is."""
    texts_within_limits(control, request)
    if request.count > control.settings.max_images:
        problem = f"this server takes at most {control.settings.max_images} (max_images)"
        raise RequestError("count", request.count, problem)
    return variants.chosen(request, wildcards(control))


def _checked(control: Services, request: Request) -> tuple[Request, str]:
    model = model_named(control, request.model)
    request = replace(request, model=model.name, isolate=request.isolate or control.settings.isolate)
    # What was chosen may be longer than what was written.
    texts_within_limits(control, request)
    asked = settled(request, model, control.shelves, by_path=False)
    request = asked.request
    within_limits(control, request, model)
    check(request, model, asked.words)
    return request, model.digest


async def ended(control: Services, job: Job, http: HTTPRequest) -> Job:
    """The job after it ended, for a client that waits for it; when the client goes, the job is cancelled."""
    waiting = asyncio.ensure_future(bridge.ended(control.database, control.events, job.id))
    gone = asyncio.ensure_future(_gone(http))
    stuck = asyncio.ensure_future(_stuck(control))
    try:
        await asyncio.wait((waiting, gone, stuck), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if stuck.done():
            raise RefusedError(507, "storage", f"the queue waits: {stuck.result()}")
        raise RefusedError(400, "gone", "the client went away")
    finally:
        gone.cancel()
        stuck.cancel()
        if not waiting.done():
            waiting.cancel()
            await _given_up(control, job)


async def all_ended(control: Services, jobs: list[Job], http: HTTPRequest) -> list[Job]:
    """The jobs after they ended, one after another: see :func:`ended`."""
    try:
        return [await ended(control, job, http) for job in jobs]
    finally:
        for job in jobs:
            # Who has ended cannot be cancelled.
            await _given_up(control, job)


async def _given_up(control: Services, job: Job) -> None:
    """Nobody waits for the job any more. With a full disk that cannot be noted; then it is made all the same."""
    with contextlib.suppress(StorageError):
        await bridge.run(control.dispatcher.cancel, job.id)


async def _stuck(control: Services) -> str:
    """Why the queue cannot go on, as soon as it cannot."""
    while not control.dispatcher.trouble:
        await asyncio.sleep(TROUBLE_SECONDS)
    return control.dispatcher.trouble


async def _gone(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
