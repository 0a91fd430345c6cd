"""The stream of events for a client of OpenAI's API that asks for one: previews, then the images.

Source: https://platform.openai.com/docs/api-reference/images-streaming.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from anyio import CancelScope
from PIL import Image as PILImage
from sse_starlette.event import ServerSentEvent

from safelight.assembly.services import Services
from safelight.queue.database import StoredImage
from safelight.queue.events import Event
from safelight.queue.job import ENDED, QueuedJob
from safelight.server import bridge, event_stream, intake
from safelight.server.problems import of_job

LOOK_SECONDS = 5.0
"""If no event comes for this time, the database is asked."""

MOST_IMAGES = 1000
"""A job has no more images."""

Kind = Literal["image_generation", "image_edit"]


@dataclass(frozen=True, slots=True)
class Stream:
    """How the images of some jobs are sent.

    ``partial_images``: previews of each image.
    ``form``: ``png``, ``jpeg`` or ``webp``.
    ``quality``: as the client asked for it.
    ``encode``: returns a finished image in this form, in base64.
    """

    control: Services
    jobs: Sequence[QueuedJob]
    kind: Kind
    partial_images: int
    form: str
    quality: str
    encode: Callable[[StoredImage], str]
    _sent: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

    async def events(self) -> AsyncGenerator[ServerSentEvent]:
        """Yield the events, and at the end why a job failed. When the client is gone, its jobs are cancelled."""
        failed: QueuedJob | None = None
        try:
            async with bridge.listening(self.control.events) as arrived:
                for job in self.jobs:
                    async for event in self._of_job(job, arrived):
                        yield event
                    ended = await bridge.run(self.control.database.job, job.id)
                    failed = failed or (ended if ended is not None and ended.state != "done" else None)
            # Last, because a client reads nothing after it.
            if failed is not None:
                yield _error(failed)
        finally:
            # The task of a client that left is cancelled: without the shield, so would this be.
            with CancelScope(shield=True):
                for job in self.jobs:
                    await intake.cancel(self.control, job)

    async def _of_job(self, job: QueuedJob, arrived: asyncio.Queue[Event]) -> AsyncGenerator[ServerSentEvent]:
        """Yield the previews and images of a job.

        The database may have an image while its previews still wait among the events. So an image is sent when its
        event comes. All that are there are sent at the start, at the end, and if no event comes.
        """
        sent, due, now = 0, MOST_IMAGES, await bridge.run(self.control.database.job, job.id)
        while now is not None:
            for image in await bridge.run(self._images, job.id, sent, due) if due > sent else ():
                sent += 1
                data = {"b64_json": await bridge.run(self.encode, image), "usage": USAGE}
                yield self._event("completed", job, data)
            if now.state in ENDED:
                break
            event = await self._next(job, arrived)
            if event is not None and event.kind == "progress":
                partial = self._partial(job, event)
                if partial is not None:
                    yield await bridge.run(self._preview, job, event, partial)
                due = sent
            elif event is not None and event.kind == "image":
                due = sent + 1
            else:
                due, now = MOST_IMAGES, await bridge.run(self.control.database.job, job.id)

    async def _next(self, job: QueuedJob, arrived: asyncio.Queue[Event]) -> Event | None:
        """Return the next event that says something new of a job; None if none comes, or if the job has ended."""
        while True:
            try:
                event = await asyncio.wait_for(arrived.get(), LOOK_SECONDS)
            except TimeoutError:
                # A client that reads slowly may miss events.
                return None
            if event.job == job.id and event.kind in ("progress", "image"):
                return event
            if event.job == job.id and event.kind == "job" and event.data["state"] in ENDED:
                return None

    def _images(self, job: str, first: int, end: int) -> list[StoredImage]:
        """Return the images of a job that are there, from one place to before another."""
        return list(self.control.database.images.of_job(job))[first:end]

    def _partial(self, job: QueuedJob, event: Event) -> int | None:
        """Return the number of a preview that is due, None if none is. They are spread over the steps evenly."""
        if "preview" not in event.data:
            return None
        key = job.id, int(event.data["image"])
        count = self._sent.get(key, 0)
        step, steps = int(event.data["step"]), int(event.data["steps"])
        if count >= self.partial_images or step * (self.partial_images + 1) < steps * (count + 1):
            return None
        self._sent[key] = count + 1
        return count

    def _preview(self, job: QueuedJob, event: Event, number: int) -> ServerSentEvent:
        picture = base64.b64decode(str(event.data["preview"]).partition(",")[2])
        out = io.BytesIO()
        with PILImage.open(io.BytesIO(picture)) as small:
            size = job.request.width or small.width, job.request.height or small.height
            small.convert("RGB").resize(size, PILImage.Resampling.BICUBIC).save(out, self.form.upper())
        data = {"b64_json": base64.b64encode(out.getvalue()).decode(), "partial_image_index": number}
        return self._event("partial_image", job, data)

    def _event(self, what: str, job: QueuedJob, data: Mapping[str, Any]) -> ServerSentEvent:
        name = f"{self.kind}.{what}"
        common: dict[str, Any] = {
            "type": name,
            "created_at": int(job.created),
            "background": "opaque",
            "output_format": self.form,
            "quality": self.quality,
            "size": f"{job.request.width}x{job.request.height}",
        }
        return event_stream.event(name, json.dumps({**common, **data}))


def _error(job: QueuedJob) -> ServerSentEvent:
    problem = of_job(job)
    error = {"message": str(problem), "type": "server_error", "code": problem.kind, "param": problem.field}
    return event_stream.event("error", json.dumps({"type": "error", "error": error}))


USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Safelight counts no tokens; OpenAI's clients need the field."""
