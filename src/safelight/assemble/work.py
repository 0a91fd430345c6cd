"""The worker: a process that computes for a server. ``python -m safelight.assemble.work FD`` is started by
:mod:`safelight.engine.supervisor`; the number is that of its pipe.

One thread computes, one listens. When the pipe ends the server is gone, and the worker leaves at once. When something
fails that nobody has foreseen, it says so and leaves: a fresh process is the best state to go on from.
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

import structlog

from safelight import logs
from safelight.assemble import opening
from safelight.assemble.pipe import Pipe, carried_out
from safelight.engine.messages import (
    Answer,
    Ask,
    Cancel,
    Generate,
    Imported,
    Open,
    Ready,
)
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.engine.local import LocalEngine


class Worker:
    """``connection``: to the server."""

    def __init__(self, connection: Connection) -> None:
        self._pipe = Pipe(connection)
        self._jobs: queue.SimpleQueue[Generate] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._engine: LocalEngine

    def run(self) -> None:
        """Serve until the server is gone."""
        opening.imported()
        self._pipe.say(Imported())
        message = self._pipe.hear()
        assert isinstance(message, Open)
        logs.to_stderr(message.settings.log_format)
        self._engine = opening.open_engine(message.settings, previews=True)
        self._pipe.say(Ready(asdict(self._engine.bench.run)))
        threading.Thread(target=self._listen, name="safelight-listen", daemon=True).start()
        for name in message.pinned:
            try:
                self._engine.pin(name)
            except SafelightError as error:
                structlog.get_logger().warning("a model cannot be held", model=name, why=str(error))
        while True:
            self._work(self._jobs.get())

    def _listen(self) -> None:
        while True:
            message = self._pipe.hear()
            match message:
                case Generate():
                    self._jobs.put(message)
                case Cancel(job):
                    self._cancelled.add(job)
                case Ask():
                    # In a thread of its own: bringing a model must not keep a job from being cancelled.
                    threading.Thread(target=self._answer, args=(message,), daemon=True).start()
                case _:
                    raise AssertionError(message)

    def _answer(self, ask: Ask) -> None:
        try:
            self._pipe.say(Answer(ask.tag, self._answered(ask)))
        except SafelightError as error:
            self._pipe.say(Answer(ask.tag, None, str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it was, the server must hear of it
            traceback.print_exc()
            self._pipe.say(Answer(ask.tag, None, f"{type(error).__name__}: {error}"))

    def _answered(self, ask: Ask) -> object:
        engine = self._engine
        if ask.what == "memory":
            return engine.memory()
        if ask.what == "prefetch":
            return engine.prefetch(ask.model)
        match ask.what:
            case "load":
                engine.make_resident(engine.library.resolve(ask.model))
            case "pin":
                engine.pin(ask.model)
            case "unpin":
                engine.unpin(ask.model)
            case _:
                engine.unload(ask.model or None)
        return list(engine.resident())

    def _work(self, job: Generate) -> None:
        ended, leave = carried_out(self._engine, job, self._pipe, lambda: job.job in self._cancelled)
        self._cancelled.discard(job.job)
        self._pipe.say(ended)
        if leave:
            os._exit(1)


def main() -> None:
    # Who started the server stops it by Ctrl-C; the server stops the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.to_stderr()
    with contextlib.suppress(KeyboardInterrupt):
        Worker(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
