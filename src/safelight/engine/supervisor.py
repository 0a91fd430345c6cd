"""The worker process of a server, and a spare that takes its place when it dies. No torch.

The spare has imported everything and holds no model, so that a restart costs what a switch costs.
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
import structlog

from safelight.engine.messages import (
    Answer,
    Ask,
    Cancel,
    Ended,
    FromWorker,
    Generate,
    Imported,
    Open,
    Question,
    Ready,
    ToWorker,
)
from safelight.errors import Cancelled, WorkerDiedError

_log = structlog.get_logger(__name__)

DEATHS = 5
"""Workers that die one after another before they are ready: then there is no use in starting more."""

LOOK_SECONDS = 0.1
"""Between two looks at whether a job that waits for its worker is still wanted."""

SPARE_AFTER = 1.0
"""Seconds after a worker has come up."""


class Process:
    """One worker process: what it says about jobs goes into ``inbox``, None when it is dead; ``on_death`` is told then,
    by a thread of its own."""

    def __init__(self, command: Sequence[str], on_death: Callable[[Process], None] = lambda _: None) -> None:
        self._on_death = on_death
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
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
    def came_up(self) -> bool:
        """Whether its engine was opened."""
        return self.ready.done() and self.ready.exception() is None

    def send(self, message: ToWorker) -> None:
        """Raises WorkerDiedError when nobody listens any more."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError as error:
            raise self.died() from error

    def open(self, settings: object, pinned: Sequence[str] = ()) -> None:
        """Have it open its engine. Raises WorkerDiedError."""
        self.send(Open(settings, tuple(pinned)))

    def ask(self, what: Question, model: str) -> Future[Any]:
        """See :meth:`Supervisor.ask`."""
        tag, future = next(self._tags), Future[Any]()
        self._answers[tag] = future
        with contextlib.suppress(WorkerDiedError):
            self.send(Ask(tag, what, model))
        # Whoever takes a future out sets it; the thread that reads may have taken its last look already.
        if self._dead and self._answers.pop(tag, None) is not None:
            future.set_exception(self.died())
        return future

    def died(self) -> WorkerDiedError:
        """How it ended, as an error."""
        with self._reaping:
            code = self._process.wait()
            self._died = min(self._died, time.time())
        if code >= 0:
            return WorkerDiedError(f"ended with exit code {code}")
        name = signal.Signals(-code).name
        why = " (often the system, because memory ran out)" if -code == signal.SIGKILL else ""
        return WorkerDiedError(f"was killed by {name}{why}")

    def kill(self) -> None:
        """End it now, with what it has forked, and wait until it is gone."""
        for process in self._left_behind():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        with self._reaping:
            if self._process.returncode is None:
                # It has not been waited for, so its number, and that of its group, is still its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()

    def _left_behind(self) -> list[psutil.Process]:
        """What it has forked and what lives after it: of its session, and begun before it ended."""
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
            except Exception:  # noqa: BLE001 - a worker that writes what cannot be read is as good as dead
                _log.exception("a worker said what cannot be read", pid=self.pid)
                break
            match message:
                case Imported():
                    self.imported_all = True
                case Ready(run):
                    self.ready.set_result(run)
                case Answer(tag, value, problem):
                    future = self._answers.pop(tag, None)
                    if future is not None:
                        future.set_result(value) if not problem else future.set_exception(RuntimeError(problem))
                case _:
                    self.inbox.put(message)
        # Its end of the pipe closes when it dies; what keeps a process without a pipe is of no use.
        self._process.kill()
        error = self.died()
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
    """Keeps one worker and one spare. ``command`` starts a process, ``settings`` are what it opens its engine with.

    Jobs are run one after another, by one thread; everything else may be called from several.
    """

    def __init__(self, command: Sequence[str], settings: object, spare: bool = True) -> None:
        self._command = list(command)
        self._settings = settings
        self._with_spare = spare
        self._lock = threading.RLock()
        self._closed = False
        self._spare: Process | None = None
        self._pinned: dict[str, None] = {}
        self._active = self._started()
        self._job = ""
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the worker that computes."""
        return self._active.pid

    def run_settings(self, timeout: float) -> Mapping[str, Any] | None:
        """The worker's run settings; None when it is not ready within ``timeout`` seconds."""
        try:
            return self._active.ready.result(timeout)
        except (TimeoutError, WorkerDiedError):
            return None

    def _started(self) -> Process:
        """A worker that is opening its engine: the spare if there is one; a new spare follows."""
        with self._lock:
            worker, self._spare = self._spare or self._new(), None
        if self._with_spare:
            threading.Thread(target=self._spare_beside, args=(worker,), daemon=True).start()
        try:
            worker.open(self._settings, tuple(self._pinned))
        except WorkerDiedError:
            _log.warning("a worker died before it was used", pid=worker.pid)
        return worker

    def _spare_beside(self, worker: Process) -> None:
        """Start a spare, when the worker has come up and begun its work: importing takes a core for seconds."""
        with contextlib.suppress(WorkerDiedError):
            worker.ready.result()
        time.sleep(SPARE_AFTER)
        with self._lock:
            if self._active is worker and self._spare is None and not self._closed:
                self._spare = self._new()

    def _new(self) -> Process:
        return Process(self._command, self._noticed)

    def _noticed(self, process: Process) -> None:
        """A process died: another takes its place at once, also when nobody has a job for it. One that never came up is
        left to :meth:`_ready`, which gives up after a few."""
        with self._lock:
            if self._closed or not process.imported_all:
                return
            if process is self._spare:
                self._spare = self._new()
            elif process is self._active and process.came_up:
                self._replace(process, process.died())

    def _ready(self, cancelled: Callable[[], bool]) -> Process:
        """A worker whose engine is open. Raises WorkerDiedError when none comes up, Cancelled when nobody waits."""
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
                last = worker.died()
            self._replace(worker, last)
        raise WorkerDiedError(f"cannot be started; the last of {DEATHS} {last.how}")

    def _replace(self, worker: Process, why: WorkerDiedError) -> None:
        with self._lock:
            if self._active is not worker or self._closed:
                return
            _log.warning("the worker is replaced", why=str(why), pid=worker.pid)
            self.restarts += 1
            self._active = self._started()

    def run(self, wanted: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """What the worker says about the job, its end (Ended) last. Who closes it before the end has the job cancelled.

        ``cancelled`` is asked until the worker has the job; from then on :meth:`cancel` reaches it. Raises Cancelled,
        and WorkerDiedError, after which another worker is on its way.
        """
        worker = self._ready(cancelled)
        self._job = wanted.job
        try:
            worker.send(wanted)
            if cancelled():
                worker.send(Cancel(wanted.job))
            while True:
                message = worker.inbox.get()
                if message is None:
                    raise worker.died()
                if getattr(message, "job", wanted.job) != wanted.job:
                    # Of an earlier job, whose messages nobody took to the end.
                    continue
                yield message
                if isinstance(message, Ended):
                    return
        except GeneratorExit:
            self.cancel(wanted.job)
            raise
        except WorkerDiedError as error:
            self._replace(worker, error)
            raise
        finally:
            self._job = ""

    def cancel(self, job: str) -> None:
        """Stop the job if it is the one that runs."""
        if self._job == job:
            try:
                self._active.send(Cancel(job))
            except WorkerDiedError:
                return

    def ask(self, what: Question, model: str = "") -> Future[Any]:
        """See :class:`safelight.engine.messages.Ask`; the answer, WorkerDiedError, or RuntimeError with the problem."""
        worker = self._active
        if what == "unpin":
            self._pinned.pop(model, None)
        if not worker.ready.done():
            future: Future[Any] = Future()
            future.set_exception(WorkerDiedError("is not ready yet"))
            return future
        answer = worker.ask(what, model)
        if what == "pin":
            answer.add_done_callback(lambda done: self._holds(model, done))
        return answer

    def _holds(self, model: str, answer: Future[Any]) -> None:
        """What is held now, a worker that takes its place holds too."""
        if answer.exception() is None:
            self._pinned[model] = None

    @property
    def pinned(self) -> tuple[str, ...]:
        """The names of models that are held."""
        return tuple(self._pinned)

    def spare_is_ready(self, timeout: float = 0.0) -> bool:
        """Whether there is one that has imported everything, within ``timeout`` seconds."""
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
            there = [worker for worker in (self._active, self._spare) if worker is not None]
            self._spare = None
        for worker in there:
            worker.kill()
