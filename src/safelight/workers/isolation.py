"""Makes images in a process that has never held another model, in about the time of a warm process. No torch.

A *zygote* has imported everything and holds no model. For each model it forks a *keeper*, which reads the weights and
protects their memory against writing. For each image the keeper forks a child. The child shares the keeper's memory
pages, computes, and ends. So the child has never held another image or model, and there is no second copy of the
weights.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import psutil

from safelight.catalog.catalog import Catalog
from safelight.errors import Cancelled, InputError, SafelightError, WorkerDiedError
from safelight.request.job import Job
from safelight.request.results import Image, OnProgress
from safelight.request.schema import Request
from safelight.resolve.resolve import resolve
from safelight.workers.engine import ignore
from safelight.workers.messages import Cancel, Ended, FromWorker, Generate, JobStarted, Made, Progressed
from safelight.workers.supervisor import Process


class ForkingRunner:
    """Runs jobs in isolated processes, one after another.

    command: starts a zygote. The first job starts it, and the next job after its death starts it again.
    settings: the zygote opens its engines with them.
    """

    def __init__(self, command: Sequence[str], settings: object) -> None:
        self._command = command
        self._settings = settings
        self._zygote: Process | None = None
        self._closed = False
        self._child: psutil.Process | None = None
        self._job = ""

    def start(self) -> None:
        """Start a zygote if none is alive."""
        if self._closed:
            raise SafelightError("the server is stopping")
        if self._zygote is None or not self._zygote.alive:
            if self._zygote is not None:
                # Its children may still be alive.
                self._zygote.kill()
            self._zygote = Process(self._command)
            self._zygote.open(self._settings)

    def run(self, generate: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """See :meth:`safelight.workers.supervisor.Supervisor.run`."""
        self.start()
        zygote = self._zygote
        assert zygote is not None
        zygote.send(generate)
        self._job, self._child = generate.job_id, None
        ended = False
        try:
            while not ended:
                message = zygote.inbox.get()
                if message is None:
                    ended = True
                    raise zygote.death_error()
                if isinstance(message, JobStarted):
                    self._record_process(message.pid)
                    if cancelled():
                        self.cancel(generate.job_id)
                    continue
                ended = isinstance(message, Ended)
                yield message
        finally:
            if not ended:
                # The caller stopped before the end. The next job must not receive the rest of these messages.
                self.cancel(generate.job_id)
                self._skip_to_end(zygote)
            self._job, self._child = "", None

    def _skip_to_end(self, zygote: Process) -> None:
        """Read the remaining messages of the cancelled job. It ends after one step at most."""
        while True:
            message = zygote.inbox.get()
            if isinstance(message, JobStarted):
                self._record_process(message.pid)
                self.cancel(self._job)
            elif message is None or isinstance(message, Ended):
                return

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is the one that runs."""
        child = self._child
        if self._job == job and child is not None:
            # psutil compares start times, so a new process with the same pid gets no signal.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGUSR1)

    def _record_process(self, pid: int) -> None:
        try:
            self._child = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._child = None

    def kill(self) -> None:
        """Kill the zygote and its children, because a job makes no progress. The next job starts another one."""
        zygote = self._zygote
        if zygote is not None:
            zygote.kill()

    def close(self) -> None:
        """End the zygote and its children."""
        self._closed = True
        if self._zygote is not None:
            self._zygote.kill()


class SpawningRunner:
    """Runs each job in a new process that ends with the job. It, too, follows the protocol :class:`IsolatedRunner`.

    It is for a Mac, where Accelerate and Metal do not survive a fork.

    command: starts a worker.
    settings: the worker opens its engine with them.
    """

    def __init__(self, command: Sequence[str], settings: object) -> None:
        self._command = command
        self._settings = settings
        self._process: Process | None = None
        self._closed = False
        self._job = ""

    def run(self, generate: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """See :meth:`safelight.workers.supervisor.Supervisor.run`."""
        if self._closed:
            raise SafelightError("the server is stopping")
        process = self._process = Process(self._command)
        self._job = generate.job_id
        try:
            process.open(self._settings)
            process.send(generate)
            if cancelled():
                process.send(Cancel(generate.job_id))
            while (message := process.inbox.get()) is not None:
                yield message
                if isinstance(message, Ended):
                    return
            raise process.death_error()
        finally:
            process.kill()
            self._process, self._job = None, ""

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is the one that runs."""
        process = self._process
        if self._job == job and process is not None:
            with contextlib.suppress(WorkerDiedError):
                process.send(Cancel(job))

    def kill(self) -> None:
        """Kill the running process, because its job makes no progress."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the running process, and start no other."""
        self._closed = True
        self.kill()


class IsolatedRunner(Protocol):
    """The protocol of :class:`ForkingRunner` and :class:`SpawningRunner`."""

    def run(self, generate: Generate, cancelled: Callable[[], bool] = ...) -> Generator[FromWorker]: ...

    def cancel(self, job: str) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


def forks(platform: str = sys.platform) -> bool:
    """Whether a process of this platform may fork after it imported torch."""
    return platform != "darwin"


class IsolatedEngine:
    """Makes each image in a process that has never held another model. See :class:`safelight.workers.engine.Engine`."""

    def __init__(self, catalog: Catalog, isolated_runner: IsolatedRunner) -> None:
        self.catalog = catalog
        self._isolated_runner = isolated_runner

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.workers.engine.Engine`. The zygote stays alive for the next request."""
        return self.run(resolve(request, self.catalog), on_progress)

    def run(self, job: Job, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """Make the images of a job."""
        with contextlib.closing(self._isolated_runner.run(Generate("cli", job, 0, ()))) as messages:
            for message in messages:
                match message:
                    case Progressed(_, progress):
                        on_progress(progress)
                    case Made(_, _, image):
                        yield image
                    case Ended(_, kind, problem, _) if kind != "done":
                        raise _error(kind, problem)
                    case _:
                        pass

    def close(self) -> None:
        """End all isolated processes."""
        self._isolated_runner.close()


def _error(kind: str, problem: str) -> SafelightError:
    if kind == "cancelled":
        return Cancelled()
    # Only the message has come from the other process. These two classes need nothing more.
    return InputError(problem) if kind == "input" else SafelightError(problem)
