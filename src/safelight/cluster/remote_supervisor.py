"""The server's side of a slot on another machine. It has the methods of a supervisor of this machine's worker.

Ray places the actor, and starts it again when its process or its machine is lost. A job's messages come as a stream. If
the stream is silent for the time of the lease, the job is given back and the stream is never read again: so a machine
that comes back late cannot finish the job a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from safelight.cluster.needed import Needed
from safelight.cluster.node_slot import versions
from safelight.errors import Cancelled, SafelightError, WorkerDiedError
from safelight.logs import Log
from safelight.request.job import Job
from safelight.request.schema import Request
from safelight.workers.messages import Command, Ended, FromWorker, Generate, Made

_log = Log(__name__)

LOOK_SECONDS = 0.5
"""Seconds between two looks at a stream, so that a cancellation is noticed."""

PING_SECONDS = 2.0
"""Seconds between two questions whether the machine is there."""

Start = Callable[[], Any]
"""Starts the actor, and returns its handle."""


class RemoteSupervisor:
    """Runs jobs on a slot of another machine.

    ``start``: starts the actor.
    ``needed``: returns what a machine needs for a job.
    ``lease``: seconds after which a silent slot has lost its job.
    ``other_versions``: whether a machine with other versions may compute.
    ``changed``: called when the slot becomes available.

    The attribute ``problem`` says why the slot takes no jobs; "" if it does.
    """

    def __init__(
        self,
        start: Start,
        needed: Callable[[Job], Needed],
        lease: float,
        other_versions: bool,
        changed: Callable[[], None],
    ) -> None:
        self._needed, self._lease, self._other_versions, self._changed = needed, lease, other_versions, changed
        self._actor = start()
        self._start = start
        self._running: tuple[str, str] | None = None
        self._closed = threading.Event()
        self._run_settings: Mapping[str, Any] | None = None
        self.restarts = 0
        self.about: Mapping[str, Any] = {}
        self.problem = "waits for a machine of the cluster"
        threading.Thread(target=self._watch, name="safelight-cluster-watch", daemon=True).start()

    @property
    def machine(self) -> str:
        """The machine that Ray has chosen, and the number of its slot."""
        return str(self.about.get("name", ""))

    @property
    def pinned(self) -> tuple[str, ...]:
        """No model is pinned on another machine."""
        return ()

    def run_settings(self, timeout: float) -> Mapping[str, Any] | None:
        """The run settings of the worker; None if it is not ready."""
        del timeout
        return self._run_settings

    def spare_is_ready(self, timeout: float = 0.0) -> bool:
        """Whether the slot is available: the machine keeps its spare itself."""
        del timeout
        return not self.problem

    def run(self, generate: Generate, cancelled: Callable[[], bool] = lambda: False) -> Generator[FromWorker]:
        """See :meth:`safelight.workers.supervisor.Supervisor.run`."""
        if cancelled():
            raise Cancelled
        needed, attempt = self._needed(generate.job), uuid.uuid4().hex
        self._running = generate.job_id, attempt
        stream: Any = self._actor.run.options(num_returns="streaming").remote(attempt, generate, needed)
        ended = False
        try:
            for message in self._messages(stream, attempt, cancelled):
                ended = isinstance(message, Ended)
                yield message
                if ended:
                    return
        except RayTaskError as error:
            cause: Any = error.cause
            if isinstance(cause, SafelightError):
                raise cause from error
            raise self._lost(f"failed: {cause or error}") from error
        except RayError as error:
            raise self._lost(f"is lost: {_first_line(error)}") from error
        finally:
            self._running = None
            if not ended:
                # Nobody reads the rest. Whatever the machine still does with this job goes nowhere.
                self._ask_to_cancel(attempt)

    def _messages(self, stream: Any, attempt: str, cancelled: Callable[[], bool]) -> Generator[FromWorker]:
        heard, asked = time.monotonic(), False
        while True:
            if cancelled() and not asked:
                self._ask_to_cancel(attempt)
                asked = True
            done, _ = ray.wait([stream], timeout=LOOK_SECONDS, fetch_local=True)
            if not done:
                if time.monotonic() - heard > self._lease:
                    self._replace_actor()
                    raise self._lost(f"was silent for {self._lease:.0f} s, so its lease ended")
                continue
            try:
                reference: Any = next(stream)
                messages = cast("list[FromWorker]", ray.get(reference, timeout=self._lease))
            except StopIteration as error:
                raise self._lost("ended without a result") from error
            except GetTimeoutError as error:
                raise self._lost(f"did not send a result within {self._lease:.0f} s") from error
            heard = time.monotonic()
            for message in messages:
                if isinstance(message, Made):
                    self._compare(message)
                yield message

    def _compare(self, message: Made) -> None:
        """Raise WorkerDiedError if an image arrived with other pixels than were made."""
        if hashlib.sha256(message.image.pixels).hexdigest() != message.image.pixels_sha256:
            raise self._lost("sent an image whose pixels are not those that it made")

    def _lost(self, how: str) -> WorkerDiedError:
        self.restarts += 1
        name = self.about.get("name", "a machine")
        self.problem = f"{name} {how}"
        return WorkerDiedError(f"on {name} {how}")

    def _replace_actor(self) -> None:
        """Leave an actor that is silent, and let Ray place a new one. A machine that wakes up late ends the old one."""
        old = self._actor
        with contextlib.suppress(RayError, ValueError):
            ray.kill(old, no_restart=True)
        self._actor = self._start()

    def cancel(self, job: str) -> None:
        """Stop a job at its next step, if it is the one that runs."""
        running = self._running
        if running is not None and running[0] == job:
            self._ask_to_cancel(running[1])

    def _ask_to_cancel(self, attempt: str) -> None:
        with contextlib.suppress(RayError):
            self._actor.cancel.remote(attempt)

    def kill(self) -> None:
        """Replace the worker, because it makes no progress."""
        with contextlib.suppress(RayError):
            self._actor.kill.remote()

    def ask(self, command: Command, model: str = "", request: Request | None = None) -> Future[Any]:
        """See :meth:`safelight.workers.supervisor.Supervisor.ask`."""
        if self.problem:
            refused: Future[Any] = Future()
            refused.set_exception(WorkerDiedError(f"cannot be asked: {self.problem}"))
            return refused
        answer: Future[Any] = Future()
        asked: Future[Any] = self._actor.ask.remote(command, model, request).future()

        def pass_on(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            elif isinstance(error, RayTaskError) and isinstance(error.cause, SafelightError | RuntimeError):
                answer.set_exception(error.cause)
            else:
                answer.set_exception(WorkerDiedError(f"did not answer: {_first_line(error)}"))

        asked.add_done_callback(pass_on)
        return answer

    def close(self) -> None:
        """End the actor and its processes."""
        self._closed.set()
        with contextlib.suppress(RayError, ValueError):
            ray.get(self._actor.close.remote(), timeout=5)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._actor, no_restart=True)

    def _watch(self) -> None:
        """Ask the actor again and again whether it is there, and whether its worker is ready."""
        while not self._closed.is_set():
            problem = self._look()
            before, self.problem = self.problem, problem
            if before and not problem:
                _log.info("a slot of the cluster is available", name=self.about.get("name"))
                self._changed()
            elif problem and problem != before:
                _log.warning("a slot of the cluster is not available", why=problem)
                self._run_settings = None
            self._closed.wait(PING_SECONDS)

    def _look(self) -> str:
        """Return why the slot cannot take jobs; "" if it can."""
        try:
            about, run = ray.get([self._actor.about.remote(), self._actor.ready.remote()], timeout=2 * PING_SECONDS)
        except GetTimeoutError:
            return f"{self.about.get('name', 'a machine')} does not answer" if self.about else "waits for a machine"
        except RayError as error:
            return f"{self.about.get('name', 'a machine')} is lost: {_first_line(error)}"
        self.about, self._run_settings = about, run
        here, there = versions(), about["versions"]
        other = [f"{name} {there.get(name)} in place of {here[name]}" for name in here if there.get(name) != here[name]]
        if other and not self._other_versions:
            return f"{about['name']} has other versions: {', '.join(other)} (setting cluster_other_versions)"
        return "" if run is not None else f"{about['name']}: its worker starts"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
