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
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from safelight import logs
from safelight.assembly import importing
from safelight.assembly.pipe import Pipe, run_job
from safelight.errors import SafelightError
from safelight.queue.job import failure_of
from safelight.workers.isolation import forks
from safelight.workers.messages import Ended, Generate, Imported, JobStarted, Open, Ready

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine


class _Zygote:
    """``connection``: to the server or command. Only the process that waits for the next job reads it: the zygote or
    the keeper."""

    def __init__(self, connection: Connection) -> None:
        self._pipe = Pipe(connection)

    def run(self) -> None:
        """Run jobs until the other end of the pipe is gone."""
        importing.import_engine()
        self._pipe.say(Imported())
        message = self._pipe.hear()
        assert isinstance(message, Open)
        self._settings = message.settings
        logs.to_stderr(message.settings.log_format)
        self._pipe.say(Ready({}))
        returned: Generate | None = None
        while True:
            message = returned or self._pipe.hear()
            assert isinstance(message, Generate)
            returned = self._fork_keeper(message)

    def _fork_keeper(self, message: Generate) -> Generate | None:
        """Fork a keeper, which runs jobs until one needs another model. Returns that job, None if there is none.

        If the keeper dies, so does this process: nobody knows which job it had, or whether it had sent a part of a
        message. Another zygote runs the job again.
        """
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            try:
                self._run_keeper(message, theirs)
            except BaseException:  # noqa: BLE001 - this process must not go on as the zygote
                traceback.print_exc()
            os._exit(1)
        os.close(theirs)
        with open(ours, "rb") as pipe:
            next_job = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status:
            _end_like(status)
        return pickle.loads(next_job) if next_job else None

    def _run_keeper(self, message: Generate, pipe: int) -> None:
        import torch

        torch.set_num_threads(1)
        engine = importing.open_engine(self._settings)
        kept = _keeper_key(message)
        try:
            engine.prepare_to_fork(message.job)
        except SafelightError as error:
            self._pipe.say(Ended(message.job_id, failure_of(error), str(error), ()))
            # The zygote starts a new keeper for the next job: it may use another model, or the file may be right by
            # then.
            self._pass_to_zygote_and_exit(self._pipe.hear(), pipe)
        gc.freeze()
        while _keeper_key(message) == kept:
            self._fork_child(engine, message)
            following = self._pipe.hear()
            assert isinstance(following, Generate)
            message = following
        self._pass_to_zygote_and_exit(message, pipe)

    @staticmethod
    def _pass_to_zygote_and_exit(message: object, pipe: int) -> NoReturn:
        with open(pipe, "wb") as file:
            file.write(pickle.dumps(message))
        os._exit(0)

    def _fork_child(self, engine: LocalEngine, message: Generate) -> None:
        pid = os.fork()
        if pid == 0:
            self._run_child(engine, message)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            # It may have sent a part of a message.
            _end_like(status)

    def _run_child(self, engine: LocalEngine, message: Generate) -> None:
        stopped = threading.Event()

        def stop(number: int, frame: object) -> None:
            del number, frame
            stopped.set()

        signal.signal(signal.SIGUSR1, stop)
        self._pipe.say(JobStarted(os.getpid()))

        ended, _ = run_job(engine, message, self._pipe, stopped.is_set)
        self._pipe.say(ended)


def _keeper_key(message: Generate) -> tuple[str, str]:
    """Return the key of a keeper: (model digest, precision). It can run every job with the same key."""
    return message.job.model.digest, message.job.request.precision


def _end_like(status: int) -> NoReturn:
    """End this process by the same signal or exit code as a child. Its parent learns the reason by it.

    ``status``: the child's, from waitpid.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):
            # SIGKILL has no handler.
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


def main() -> None:
    if not forks():
        raise SystemExit("Safelight does not fork on this system: see safelight.workers.isolation.SpawningRunner")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.to_stderr()
    _Zygote(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
