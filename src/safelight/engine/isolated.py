"""Images made in a process that has never held another model, for about the price of a warm one. No torch.

A *zygote* has imported everything and holds nothing. For a model it forks a *keeper*, which reads the weights and makes
their memory unwritable; for each image the keeper forks a child, which shares the keeper's pages, computes, and ends.
So nothing of any other image or model was ever in that process, and there is no second copy of the weights.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import psutil

from safelight.engine.base import ignore
from safelight.engine.messages import Cancel, Ended, FromWorker, Generate, Made, Progressed, Working
from safelight.engine.supervisor import Process
from safelight.errors import Cancelled, InputError, SafelightError, WorkerDiedError
from safelight.library.library import Library
from safelight.request.results import Image, OnProgress
from safelight.request.schema import Request


class Isolator:
    """Runs jobs in processes of their own, one after another. ``command`` starts a zygote, which opens its engines with
    ``settings``; it is started when the first job comes, and again when it died."""

    def __init__(self, command: Sequence[str], settings: object) -> None:
        self._command = command
        self._settings = settings
        self._zygote: Process | None = None
        self._closed = False
        self._working: psutil.Process | None = None
        self._job = ""

    def start(self) -> None:
        """Have a zygote stand ready."""
        if self._closed:
            raise SafelightError("the server stops")
        if self._zygote is None or not self._zygote.alive:
            if self._zygote is not None:
                # What it has forked may live.
                self._zygote.kill()
            self._zygote = Process(self._command)
            self._zygote.open(self._settings)

    def run(self, wanted: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """See :meth:`safelight.engine.supervisor.Supervisor.run`."""
        self.start()
        zygote = self._zygote
        assert zygote is not None
        zygote.send(wanted)
        self._job, self._working = wanted.job, None
        ended = False
        try:
            while not ended:
                message = zygote.inbox.get()
                if message is None:
                    ended = True
                    raise zygote.died()
                if isinstance(message, Working):
                    self._begins(message.pid)
                    if cancelled():
                        self.cancel(wanted.job)
                    continue
                ended = isinstance(message, Ended)
                yield message
        finally:
            if not ended:
                # Who stops listening in the middle wants nothing more of it; the next job does not hear its end.
                self.cancel(wanted.job)
                self._forget(zygote)
            self._job, self._working = "", None

    def _forget(self, zygote: Process) -> None:
        """Hear what is still said of the job, to its end, at most a step away."""
        while True:
            message = zygote.inbox.get()
            if isinstance(message, Working):
                self._begins(message.pid)
                self.cancel(self._job)
            elif message is None or isinstance(message, Ended):
                return

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is the one that runs."""
        working = self._working
        if self._job == job and working is not None:
            # It knows when the process began: another one that has got its number meanwhile is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                working.send_signal(signal.SIGUSR1)

    def _begins(self, pid: int) -> None:
        try:
            self._working = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._working = None

    def made(self, request: Request, digest: str) -> Image:
        """The first image of a request, by the model of that digest. Raises SafelightError with what failed."""
        with contextlib.closing(self.run(Generate("isolated", replace(request, count=1), digest, 0, ()))) as messages:
            image: Image | None = None
            for message in messages:
                if isinstance(message, Made):
                    image = message.image
                elif isinstance(message, Ended) and message.kind != "done":
                    raise SafelightError(f"the isolated process failed: {message.problem}")
        assert image is not None
        return image

    def close(self) -> None:
        """End the zygote and what it has forked."""
        self._closed = True
        if self._zygote is not None:
            self._zygote.kill()


class Spawner:
    """Runs jobs in processes that are started for them and end with them, where nothing may be forked: on a Mac,
    Accelerate and Metal do not survive it. ``command`` starts a worker. The same methods as :class:`Isolator`'s."""

    def __init__(self, command: Sequence[str], settings: object) -> None:
        self._command = command
        self._settings = settings
        self._process: Process | None = None
        self._closed = False
        self._job = ""

    def run(self, wanted: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """See :meth:`safelight.engine.supervisor.Supervisor.run`."""
        if self._closed:
            raise SafelightError("the server stops")
        process = self._process = Process(self._command)
        self._job = wanted.job
        try:
            process.open(self._settings)
            process.send(wanted)
            if cancelled():
                process.send(Cancel(wanted.job))
            while (message := process.inbox.get()) is not None:
                yield message
                if isinstance(message, Ended):
                    return
            raise process.died()
        finally:
            process.kill()
            self._process, self._job = None, ""

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is the one that runs."""
        process = self._process
        if self._job == job and process is not None:
            with contextlib.suppress(WorkerDiedError):
                process.send(Cancel(job))

    def close(self) -> None:
        """End what is at work."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()


class Isolating(Protocol):
    """What runs jobs in processes that have held no other model."""

    def run(self, wanted: Generate, cancelled: Callable[[], bool] = ...) -> Generator[FromWorker]: ...

    def cancel(self, job: str) -> None: ...

    def close(self) -> None: ...


def forks(platform: str = sys.platform) -> bool:
    """Whether processes may be forked here after torch was imported."""
    return platform != "darwin"


class IsolatedEngine:
    """See :class:`safelight.engine.base.Engine`: every image in a process that has never held another model."""

    def __init__(self, library: Library, isolator: Isolating) -> None:
        self.library = library
        self._isolator = isolator

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.engine.base.Engine`. The zygote stays for the next request."""
        model = self.library.checked(self.library.resolve(request.model))
        with contextlib.closing(self._isolator.run(Generate("cli", request, model.digest, 0, ()))) as messages:
            for message in messages:
                match message:
                    case Progressed(_, progress):
                        on_progress(progress)
                    case Made(_, _, image):
                        yield image
                    case Ended(_, kind, problem, _) if kind != "done":
                        raise _meant(kind, problem)
                    case _:
                        pass

    def close(self) -> None:
        """End its processes."""
        self._isolator.close()


def _meant(kind: str, problem: str) -> SafelightError:
    if kind == "cancelled":
        return Cancelled()
    return InputError(problem) if kind == "input" else SafelightError(problem)
