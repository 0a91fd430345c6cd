"""The only seam between the server's event loop and the threads behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool

from safelight.engine.events import Event, Events
from safelight.jobs.job import ENDED, Job
from safelight.storage.db import Database

T = TypeVar("T")

BEHIND = 1000
"""Events that a listener may be behind; of those who are further, the oldest are left out."""


async def run(function: Callable[..., T], *arguments: object) -> T:
    """Run something that waits for files or other threads without holding up the loop."""
    return await run_in_threadpool(function, *arguments)


LONG_CALLS = 4
"""Calls that take long at once; further ones wait without a thread, so that pages and other calls are answered."""

_long = CapacityLimiter(LONG_CALLS)


async def long(function: Callable[..., T], *arguments: object) -> T:
    """Run something that reads whole models or waits for the worker. Who stops the server does not wait for it."""
    return await to_thread.run_sync(partial(function, *arguments), limiter=_long, abandon_on_cancel=True)


@asynccontextmanager
async def listening(events: Events, job_id: str | None = None) -> AsyncGenerator[asyncio.Queue[Event]]:
    """Within the context, what happens (to one job, or at all) arrives in the queue, in order."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event] = asyncio.Queue(BEHIND)

    def put(event: Event) -> None:
        if arrived.full():
            arrived.get_nowait()
        arrived.put_nowait(event)

    def listener(event: Event) -> None:
        if job_id is None or event.job == job_id:
            loop.call_soon_threadsafe(put, event)

    unsubscribe = events.subscribe(listener)
    try:
        yield arrived
    finally:
        unsubscribe()


async def ended(database: Database, events: Events, job_id: str) -> Job:
    """The job after it ended, however long that takes."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def listener(event: Event) -> None:
        if event.kind == "job" and event.job == job_id and event.data["state"] in ENDED:
            loop.call_soon_threadsafe(over.set)

    unsubscribe = events.subscribe(listener)
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
