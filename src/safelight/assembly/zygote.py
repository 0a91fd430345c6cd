"""The zygote process: ``python -m safelight.assembly.zygote FD``. See :mod:`safelight.workers.isolation`.

A process that forks must have no other threads, and must never have started OpenMP's threads. So the zygote only
imports and forks. The keeper reads files in threads that have ended before it forks, and computes each checksum with
one thread. Only the child computes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from safelight import logs
from safelight.assembly import importing as opening
from safelight.assembly.pipe import Pipe, carried_out
from safelight.errors import InputError, SafelightError
from safelight.workers.isolation import forks
from safelight.workers.messages import Ended, Generate, Imported, Open, Ready, Working

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine


class _Zygote:
    """``connection``: to the server or command. Only the process that waits for the next job reads it: the zygote or
    the keeper."""

    def __init__(self, connection: Connection) -> None:
        self._pipe = Pipe(connection)

    def run(self) -> None:
        """Run jobs until the other end of the pipe is gone."""
        opening.imported()
        self._pipe.say(Imported())
        message = self._pipe.hear()
        assert isinstance(message, Open)
        self._settings = message.settings
        logs.to_stderr(message.settings.log_format)
        self._pipe.say(Ready({}))
        job: Generate | None = None
        while True:
            wanted = job or self._pipe.hear()
            assert isinstance(wanted, Generate)
            job = self._fork_keeper(wanted)

    def _fork_keeper(self, wanted: Generate) -> Generate | None:
        """Fork a keeper, which runs jobs until one needs another model. Returns that job, None if the keeper died."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            with contextlib.suppress(BaseException):
                self._run_keeper(wanted, theirs)
            os._exit(1)
        os.close(theirs)
        with open(ours, "rb") as pipe:
            next_job = pipe.read()
        _, status = os.waitpid(pid, 0)
        if next_job:
            return pickle.loads(next_job)
        self._pipe.say(Ended(wanted.job, "failed", f"the process that holds the weights ended ({_how(status)})", ()))
        return None

    def _run_keeper(self, wanted: Generate, pipe: int) -> None:
        import torch

        torch.set_num_threads(1)
        engine = opening.open_engine(self._settings)
        kept = _weights_of(wanted)
        try:
            engine.share(wanted.content)
        except SafelightError as error:
            self._pipe.say(Ended(wanted.job, "input" if isinstance(error, InputError) else "failed", str(error), ()))
            # The zygote starts a new keeper for the next job: it may use another model, or the file may be right by
            # then.
            self._hand_on(self._pipe.hear(), pipe)
        gc.freeze()
        while _weights_of(wanted) == kept:
            self._fork_child(engine, wanted)
            message = self._pipe.hear()
            assert isinstance(message, Generate)
            wanted = message
        self._hand_on(wanted, pipe)

    @staticmethod
    def _hand_on(wanted: object, pipe: int) -> None:
        with open(pipe, "wb") as file:
            file.write(pickle.dumps(wanted))
        os._exit(0)

    def _fork_child(self, engine: LocalEngine, wanted: Generate) -> None:
        pid = os.fork()
        if pid == 0:
            self._run_child(engine, wanted)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            self._pipe.say(Ended(wanted.job, "failed", f"the process that computed ended ({_how(status)})", ()))

    def _run_child(self, engine: LocalEngine, wanted: Generate) -> None:
        stopped = threading.Event()

        def stop(number: int, frame: object) -> None:
            del number, frame
            stopped.set()

        signal.signal(signal.SIGUSR1, stop)
        self._pipe.say(Working(os.getpid()))

        ended, _ = carried_out(engine, wanted, self._pipe, stopped.is_set)
        self._pipe.say(ended)


def _weights_of(wanted: Generate) -> tuple[str, str]:
    """What the weights that a keeper holds depend on."""
    return wanted.content.model.digest, wanted.content.request.precision


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def main() -> None:
    if not forks():
        raise SystemExit("Safelight does not fork on this system: see safelight.workers.isolation.Spawner")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.to_stderr()
    _Zygote(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
