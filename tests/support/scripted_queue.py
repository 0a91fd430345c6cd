"""A dispatcher with a database of its own, whose workers follow scripts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from support.jobs import made_up

from safelight.assembly.programs import ZYGOTE
from safelight.errors import WorkerDiedError
from safelight.queue.database import Database
from safelight.queue.events import Events
from safelight.queue.image_files import Gallery
from safelight.queue.image_store import ImageStore
from safelight.queue.job import QueuedJob
from safelight.queue.order import OvertakeLimits
from safelight.queue.timings import Timings
from safelight.request.job import Job
from safelight.request.schema import Request
from safelight.workers.choosing import Choosing
from safelight.workers.dispatcher import Dispatcher
from safelight.workers.isolation import ForkingRunner
from safelight.workers.job_runner import JobRunner
from safelight.workers.messages import Ended, FromWorker, Generate
from safelight.workers.slot import Slot

Script = Callable[[Generate], Generator[FromWorker]]


class Told:
    """A supervisor whose worker follows a script."""

    restarts = 0
    problem = machine = ""

    def __init__(self) -> None:
        self.script: Script = done
        self.cancelled: list[str] = []

    def run(self, wanted: Generate, _: Callable[[], bool]) -> Generator[FromWorker]:
        return self.script(wanted)

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)

    def ask(self, *_: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(WorkerDiedError("says nothing"))
        return future

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


def done(wanted: Generate) -> Generator[FromWorker]:
    yield Ended(wanted.job_id, "done", "", ())


def died(_: Generate) -> Generator[FromWorker]:
    raise WorkerDiedError("was killed")
    yield


def _resolve(request: Request, digest: str) -> Job:
    return made_up(request, digest)


class Queue:
    """A dispatcher with a database of its own."""

    def __init__(
        self, folder: Path, supervisor: Any, slots: int = 1, most: int = 3, stall_seconds: float = 0.0
    ) -> None:
        self.database, self.events, self.supervisor = Database(folder), Events(), supervisor
        images, stopping = ImageStore(self.database, Gallery(folder), self.events), threading.Event()

        choosing = Choosing(self.database, OvertakeLimits())
        self.upcoming = lambda: choosing.upcoming("slot:0")

        def slot(place: int) -> Slot:
            name = f"slot:{place}"
            runner = JobRunner(
                *(name, self.database, images, supervisor, ForkingRunner(ZYGOTE, None), self.events, _resolve),
                *(lambda: choosing.upcoming(name), Timings(folder / "timings.json"), stopping),
            )
            return Slot(name, supervisor, runner)

        self.dispatcher = Dispatcher(
            *(self.database, images, [slot(place) for place in range(slots)], choosing, self.events, most),
            stopping=stopping,
            stall_seconds=stall_seconds,
        )

    def accept(self) -> QueuedJob:
        [job] = self.dispatcher.accept(made_up(Request("x", "starter-noto"), "d"))
        return job

    def ended(self, job: QueuedJob) -> QueuedJob:
        until = time.monotonic() + 10
        while True:
            found = self.database.job(job.id)
            assert found is not None
            if found.ended is not None:
                return found
            assert time.monotonic() < until, found
            time.sleep(0.005)
