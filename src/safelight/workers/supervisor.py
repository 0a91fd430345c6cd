"""Supervises the worker process of a server, and a spare that replaces it when it dies. No torch.

The spare has imported everything and holds no model, so a restart takes as long as a switch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import psutil

from safelight.errors import Cancelled, WorkerDiedError
from safelight.logs import Log
from safelight.request.schema import Request
from safelight.workers.messages import (
    Cancel,
    Command,
    Ended,
    FromWorker,
    Generate,
    Imported,
    Open,
    Ready,
    Reply,
    RunCommand,
    ToWorker,
)

_log = Log(__name__)

DEATHS = 5
"""Workers that may die in a row before they are ready. Then the supervisor gives up."""

LOOK_SECONDS = 0.1
"""Seconds between two checks whether a job that waits for its worker was cancelled."""

SPARE_AFTER = 1.0
"""Seconds between the time a worker is ready and the start of its spare."""


class Process:
    """One worker process.

    ``inbox`` receives its messages about jobs, and None when it has died. Then a thread of this object calls
    ``on_death``.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_death: Callable[[Process], None] = lambda _: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._on_death = on_death
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        self._answers: dict[int, Future[Any]] = {}
        self._tags = itertools.count()
        self.inbox: queue.SimpleQueue[FromWorker | None] = queue.SimpleQueue()
        self.imported_all = False
        self._dead = False
        self._reaping = threading.Lock()
        self._died = float("inf")
        self.ready: Future[Mapping[str, Any]] = Future()
        self._reader = threading.Thread(target=self._read, name="safelight-worker-pipe", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def engine_is_open(self) -> bool:
        """Whether the process has opened its engine."""
        return self.ready.done() and self.ready.exception() is None

    def send(self, message: ToWorker) -> None:
        """Send a message. Raises WorkerDiedError if the process is dead."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError as error:
            raise self.death_error() from error

    def open(self, settings: object, pinned: Sequence[str] = ()) -> None:
        """Tell the process to open its engine. Raises WorkerDiedError."""
        self.send(Open(settings, tuple(pinned)))

    def ask(self, command: Command, model: str, request: Request | None) -> Future[Any]:
        """See :meth:`Supervisor.ask`."""
        tag, future = next(self._tags), Future[Any]()
        self._answers[tag] = future
        with contextlib.suppress(WorkerDiedError):
            self.send(RunCommand(tag, command, model, request))
        # The reader may have drained ``_answers`` before this tag was added. Then this thread must fail the future.
        if self._dead and self._answers.pop(tag, None) is not None:
            future.set_exception(self.death_error())
        return future

    def death_error(self) -> WorkerDiedError:
        """Wait for the end of the process, and return an error that says how it ended."""
        with self._reaping:
            code = self._process.wait()
            self._died = min(self._died, time.time())
        if code >= 0:
            return WorkerDiedError(f"ended with exit code {code}")
        name = signal.Signals(-code).name
        why = " (often by the operating system, because memory ran out)" if -code == signal.SIGKILL else ""
        return WorkerDiedError(f"was killed by {name}{why}")

    def kill(self) -> None:
        """Kill the process and its children, and wait until it is gone."""
        for process in self._orphans():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        with self._reaping:
            if self._process.returncode is None:
                # Nobody has waited for the process, so the system has not reused its pid or its group's.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()

    def _orphans(self) -> list[psutil.Process]:
        """The children that outlived the process: those of its session that started before it ended."""
        if self._process.returncode is None:
            return []
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self.pid and process.create_time() <= self._died:
                    found.append(process)
        return found

    def _read(self) -> None:
        while True:
            try:
                message: FromWorker = self._connection.recv()
            except (EOFError, OSError):
                break
            except Exception:  # noqa: BLE001 - a worker that sends unreadable messages is useless
                _log.exception("a worker sent an unreadable message", pid=self.pid)
                break
            match message:
                case Imported():
                    self.imported_all = True
                case Ready(run_settings):
                    self.ready.set_result(run_settings)
                case Reply(tag, value, problem):
                    future = self._answers.pop(tag, None)
                    if future is not None:
                        future.set_result(value) if not problem else future.set_exception(RuntimeError(problem))
                case _:
                    self.inbox.put(message)
        # The worker's end of the pipe closes when it dies. If it closed the pipe and lives, it is useless.
        self._process.kill()
        error = self.death_error()
        self._dead = True
        self._connection.close()
        while self._answers:
            with contextlib.suppress(KeyError):
                self._answers.popitem()[1].set_exception(error)
        if not self.ready.done():
            self.ready.set_exception(error)
        self.inbox.put(None)
        self._on_death(self)


class Supervisor:
    """Runs one worker and one spare.

    command: starts a process.
    settings: the process opens its engine with them.
    spare: whether to start a spare.
    environment: variables of the processes, besides those of this process.

    Only one thread may call :meth:`run`, for one job at a time. All other methods are thread-safe.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: object,
        spare: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self._command = list(command)
        self._settings = settings
        self._with_spare = spare
        self._lock = threading.RLock()
        self._closed = False
        self._spare: Process | None = None
        self._pinned: dict[str, None] = {}
        self._active = self._start_worker()
        self._job = ""
        self.restarts = 0

    @property
    def pid(self) -> int:
        """The process id of the worker."""
        return self._active.pid

    @property
    def problem(self) -> str:
        """A worker of this machine is always replaced, so its slot takes jobs."""
        return ""

    @property
    def machine(self) -> str:
        """The server's own machine has no name."""
        return ""

    def run_settings(self, timeout: float) -> Mapping[str, Any] | None:
        """The worker's run settings; None when it is not ready within ``timeout`` seconds."""
        try:
            return self._active.ready.result(timeout)
        except (TimeoutError, WorkerDiedError):
            return None

    def _start_worker(self) -> Process:
        """Take the spare as the worker, or a new process if there is none. It begins to open its engine; a new spare
        follows later."""
        with self._lock:
            worker, self._spare = self._spare or self._start_process(), None
        if self._with_spare:
            threading.Thread(target=self._start_spare, args=(worker,), daemon=True).start()
        try:
            worker.open(self._settings, tuple(self._pinned))
        except WorkerDiedError:
            _log.warning("a worker died before its first job", pid=worker.pid)
        return worker

    def _start_spare(self, worker: Process) -> None:
        """Start a spare after the worker is ready and has begun its work. Importing uses one core for seconds."""
        with contextlib.suppress(WorkerDiedError):
            worker.ready.result()
        time.sleep(SPARE_AFTER)
        with self._lock:
            if self._active is worker and self._spare is None and not self._closed:
                self._spare = self._start_process()

    def _start_process(self) -> Process:
        return Process(self._command, self._replace_dead, self._environment)

    def _replace_dead(self, process: Process) -> None:
        """Replace a process that died, at once, even if no job waits.

        :meth:`_wait_until_ready` handles a worker that died before it was ready; it gives up after a few.
        """
        with self._lock:
            if self._closed or not process.imported_all:
                return
            if process is self._spare:
                self._spare = self._start_process()
            elif process is self._active and process.engine_is_open:
                self._replace(process, process.death_error())

    def _wait_until_ready(self, cancelled: Callable[[], bool]) -> Process:
        """Return a worker whose engine is open.

        Raises WorkerDiedError if no worker becomes ready, Cancelled if the job was cancelled meanwhile.
        """
        last = WorkerDiedError("was never started")
        for _ in range(DEATHS):
            worker = self._active
            try:
                while not cancelled():
                    with contextlib.suppress(TimeoutError):
                        worker.ready.result(LOOK_SECONDS)
                        break
                else:
                    raise Cancelled
            except WorkerDiedError as error:
                last = error
            else:
                if worker.alive:
                    return worker
                last = worker.death_error()
            self._replace(worker, last)
        raise WorkerDiedError(f"cannot be started: {DEATHS} attempts failed, the last one {last.how}")

    def _replace(self, worker: Process, why: WorkerDiedError) -> None:
        with self._lock:
            if self._active is not worker or self._closed:
                return
            _log.warning("replacing the worker", why=str(why), pid=worker.pid)
            self.restarts += 1
            self._active = self._start_worker()

    def run(self, generate: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """Run a job, and yield the worker's messages about it; the last one is Ended.

        Closing the generator before the end cancels the job. This method polls ``cancelled`` until the worker has the
        job; after that, use :meth:`cancel`.

        Raises:
            Cancelled: ``cancelled`` returned true.
            WorkerDiedError: the worker died; its replacement is starting.
        """
        worker = self._wait_until_ready(cancelled)
        self._job, ended = generate.job_id, False
        try:
            worker.send(generate)
            if cancelled():
                worker.send(Cancel(generate.job_id))
            while True:
                message = worker.inbox.get()
                if message is None:
                    raise worker.death_error()
                if getattr(message, "job_id", generate.job_id) != generate.job_id:
                    # It belongs to an earlier job, whose messages the caller did not read to the end.
                    continue
                ended = isinstance(message, Ended)
                yield message
                if ended:
                    return
        except GeneratorExit:
            if not ended:
                self.cancel(generate.job_id)
                self._skip_to_end(worker, generate.job_id)
            raise
        except WorkerDiedError as error:
            self._replace(worker, error)
            raise
        finally:
            self._job = ""

    def _skip_to_end(self, worker: Process, job: str) -> None:
        """Read the remaining messages of a cancelled job. It ends after one step at most.

        The job may be run again, and must not get messages of this attempt.
        """
        while (message := worker.inbox.get()) is not None:
            if isinstance(message, Ended) and message.job_id == job:
                return
        self._replace(worker, worker.death_error())

    def kill(self) -> None:
        """Kill the worker, because it makes no progress. Its job is given back, and a new worker starts."""
        self._active.kill()

    def cancel(self, job: str) -> None:
        """Stop the job at its next step, if it is running."""
        if self._job == job:
            try:
                self._active.send(Cancel(job))
            except WorkerDiedError:
                return

    def ask(self, command: Command, model: str = "", request: Request | None = None) -> Future[Any]:
        """Send the worker a command, see :class:`safelight.workers.messages.RunCommand`.

        The future returns the answer, or raises WorkerDiedError, or RuntimeError with the problem.
        """
        worker = self._active
        if command == "unpin":
            self._pinned.pop(model, None)
        if not worker.ready.done():
            future: Future[Any] = Future()
            future.set_exception(WorkerDiedError("is not ready yet"))
            return future
        answer = worker.ask(command, model, request)
        if command == "pin":
            answer.add_done_callback(lambda done: self._remember_pin(model, done))
        return answer

    def _remember_pin(self, model: str, answer: Future[Any]) -> None:
        """Remember the pinned model, so that a replacement of the worker pins it too."""
        if answer.exception() is None:
            self._pinned[model] = None

    @property
    def pinned(self) -> tuple[str, ...]:
        """The names of the pinned models."""
        return tuple(self._pinned)

    def spare_is_ready(self, timeout: float = 0.0) -> bool:
        """Whether a spare has imported everything within ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while True:
            spare = self._spare
            if spare is not None and spare.imported_all and spare.alive:
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)

    def close(self) -> None:
        """End both processes."""
        with self._lock:
            self._closed = True
            processes = [process for process in (self._active, self._spare) if process is not None]
            self._spare = None
        for process in processes:
            process.kill()
