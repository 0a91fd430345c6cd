"""The worker: the process that computes for a server.

:mod:`safelight.workers.supervisor` starts it as ``python -m safelight.assembly.worker_main FD``; FD is the file
descriptor of its pipe. One thread computes, another one reads messages. When the pipe closes, the server is gone and
the worker exits at once. After an unexpected error, the worker reports it and exits, because a new process has the
cleanest state.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from safelight import logs
from safelight.assembly import importing
from safelight.assembly.pipe import Pipe, run_job
from safelight.errors import SafelightError
from safelight.logs import Log
from safelight.workers.messages import (
    Cancel,
    Generate,
    Imported,
    Open,
    Ready,
    Reply,
    RunCommand,
)

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine

_log = Log(__name__)


class Worker:
    """Serves one engine. ``connection``: to the server."""

    def __init__(self, connection: Connection) -> None:
        self._pipe = Pipe(connection)
        self._jobs: queue.SimpleQueue[Generate] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._engine: LocalEngine

    def run(self) -> None:
        """Run jobs until the server is gone."""
        importing.import_engine()
        self._pipe.say(Imported())
        message = self._pipe.hear()
        assert isinstance(message, Open)
        logs.to_stderr(message.settings.log_format)
        self._engine = importing.open_engine(message.settings, previews=True)
        self._pipe.say(Ready(asdict(self._engine.resources.run_settings)))
        threading.Thread(target=self._listen, name="safelight-listen", daemon=True).start()
        for name in message.pinned:
            try:
                self._engine.loaded.pin(name)
            except SafelightError as error:
                _log.warning("a model cannot be pinned", model=name, why=str(error))
        while True:
            self._work(self._jobs.get())

    def _listen(self) -> None:
        while True:
            message = self._pipe.hear()
            match message:
                case Generate(job_id):
                    # What was cancelled was an earlier attempt at this job.
                    self._cancelled.discard(job_id)
                    self._jobs.put(message)
                case Cancel(job_id):
                    self._cancelled.add(job_id)
                case RunCommand():
                    # In another thread, so that this one can cancel a job while a model loads.
                    threading.Thread(target=self._reply, args=(message,), daemon=True).start()
                case _:
                    raise AssertionError(message)

    def _reply(self, call: RunCommand) -> None:
        try:
            self._pipe.say(Reply(call.tag, self._run_command(call)))
        except SafelightError as error:
            self._pipe.say(Reply(call.tag, None, str(error)))
        except Exception as error:  # noqa: BLE001 - the server must learn of any error
            traceback.print_exc()
            self._pipe.say(Reply(call.tag, None, f"{type(error).__name__}: {error}"))

    def _run_command(self, call: RunCommand) -> object:
        engine = self._engine
        if call.command == "memory":
            return engine.memory()
        if call.command == "fits":
            assert call.request is not None
            return engine.fits(call.request, engine.library.find(call.model))
        if call.command == "prefetch":
            return engine.loaded.prefetch(call.model)
        match call.command:
            case "load":
                engine.loaded.load(engine.library.find(call.model))
            case "pin":
                engine.loaded.pin(call.model)
            case "unpin":
                engine.loaded.unpin(call.model)
            case _:
                engine.loaded.unload(call.model or None)
        return list(engine.loaded.resident())

    def _work(self, message: Generate) -> None:
        ended, must_exit = run_job(self._engine, message, self._pipe, lambda: message.job_id in self._cancelled)
        self._cancelled.discard(message.job_id)
        self._pipe.say(ended)
        if must_exit:
            os._exit(1)


def main() -> None:
    # Ctrl-C reaches the server, which then stops the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.to_stderr()
    with contextlib.suppress(KeyboardInterrupt):
        Worker(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
