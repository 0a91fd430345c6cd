"""A server whose worker computes nothing: what remains is the server's own work.

``python benchmarks/replaying.py serve …`` is ``safelight serve …`` with another worker. That one makes the images of
its first job, and answers every later job at once with the same messages. ``benchmarks/serving.py --replayed`` uses it:
a server that hardly waits finds its code and data in the processor's caches, which it loses while a worker computes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from multiprocessing.connection import Connection

from safelight import logs
from safelight.assembly import programs
from safelight.assembly.worker_main import Worker
from safelight.workers.messages import Ended, FromWorker, Generate, Made, Progressed


class ReplayingWorker(Worker):
    """Makes the images of its first job, and then repeats the messages of that job for all others."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._messages: list[Progressed | Made | Ended] = []

    def _work(self, message: Generate) -> None:
        if self._messages:
            for one in self._messages:
                self._pipe.say(_of_job(one, message))
            return
        say = self._pipe.say

        def say_and_keep(message: FromWorker) -> None:
            if isinstance(message, (Progressed, Made, Ended)):
                self._messages.append(message)
            say(message)

        self._pipe.say = say_and_keep
        super()._work(message)
        self._pipe.say = say


def _of_job(one: Progressed | Made | Ended, wanted: Generate) -> FromWorker:
    """Return a message as one of another job. Its image has the seed of that job, and so a file name of its own."""
    if isinstance(one, Made):
        return Made(wanted.job_id, one.index, replace(one.image, seed=wanted.job.request.seed + one.index))
    return replace(one, job_id=wanted.job_id)


def main() -> None:
    if sys.argv[1] == "worker":
        logs.to_stderr()
        ReplayingWorker(Connection(int(sys.argv[2]))).run()
        return
    programs.WORKER = (sys.executable, "-P", __file__, "worker")

    from safelight.cli.main import run

    run()


if __name__ == "__main__":
    main()
