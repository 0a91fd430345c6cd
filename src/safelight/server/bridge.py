"""The bridge: the only place where the server's event loop and the threads meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool

from safelight.queue.database import Database
from safelight.queue.events import Event, Events
from safelight.queue.job import ENDED, QueuedJob
from safelight.queue.person import LOCAL, Person

T = TypeVar("T")

BEHIND = 1000
"""Events that wait for one listener; when more arrive, the oldest is dropped."""


async def run(function: Callable[..., T], *arguments: object) -> T:
    """Run a function that waits for files or other threads, without blocking the event loop."""
    return await run_in_threadpool(function, *arguments)


LONG_CALLS = 4
"""Long calls at the same time. Further ones wait without a thread, which leaves threads for pages and other calls."""

_long = CapacityLimiter(LONG_CALLS)


async def long(function: Callable[..., T], *arguments: object) -> T:
    """Run a function that reads whole models or waits for the worker. Stopping the server does not wait for it."""
    return await to_thread.run_sync(partial(function, *arguments), limiter=_long, abandon_on_cancel=True)


@asynccontextmanager
async def listening(
    events: Events, job_id: str | None = None, who: Person = LOCAL
) -> AsyncGenerator[asyncio.Queue[Event]]:
    """Put events into the queue, in order, until the context ends.

    ``job_id``: only events of this job.
    ``who``: only events that this person may see.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event] = asyncio.Queue(BEHIND)

    def put(event: Event) -> None:
        if arrived.full():
            arrived.get_nowait()
        arrived.put_nowait(event)

    def listener(event: Event) -> None:
        of_job = job_id is None or event.job == job_id
        if of_job and who.may(event.role) and (event.person is None or who.owns(event.person)):
            loop.call_soon_threadsafe(put, event)

    unsubscribe = events.subscribe(listener)
    try:
        yield arrived
    finally:
        unsubscribe()


async def ended(database: Database, events: Events, job_id: str) -> QueuedJob:
    """Wait without a time limit until the job has ended, and return it."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def listener(event: Event) -> None:
        if event.job == job_id and event.data["state"] in ENDED:
            loop.call_soon_threadsafe(over.set)

    unsubscribe = events.subscribe(listener, ("job",))
    try:
        while True:
            job = await run(database.job, job_id)
            assert job is not None
            if job.state in ENDED:
                return job
            await over.wait()
            over.clear()
    finally:
        unsubscribe()
