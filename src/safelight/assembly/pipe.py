"""Shared by the worker and the isolated processes: their end of the pipe, and the execution of a job."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from safelight.errors import Cancelled, DeviceLostError, SafelightError
from safelight.queue.job import failure_of
from safelight.request.results import Progress
from safelight.workers.messages import Ended, FromWorker, Generate, Made, Progressed

if TYPE_CHECKING:
    from safelight.workers.local_engine import LocalEngine


class Pipe:
    """The process's end of the pipe. ``connection``: to the server or command.

    When the other end is gone, the process exits at once.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def say(self, message: FromWorker) -> None:
        """Send a message. Thread-safe."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def hear(self) -> object:
        """Wait for the next message and return it."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)


def run_job(engine: LocalEngine, message: Generate, pipe: Pipe, stopped: Callable[[], bool]) -> tuple[Ended, bool]:
    """Make the images of a job and send each.

    Returns how the job ended, and whether the process should exit: after an unexpected error, or when the device is
    gone.
    """

    def on_progress(progress: Progress) -> None:
        if stopped():
            raise Cancelled
        pipe.say(Progressed(message.job_id, progress))

    kind, problem, must_exit = "done", "", False
    try:
        if stopped():
            raise Cancelled
        images = engine.run(message.job, on_progress, message.upcoming, message.first)
        for index, image in enumerate(images, message.first):
            pipe.say(Made(message.job_id, index, image))
    except Cancelled:
        kind = "cancelled"
    except SafelightError as error:
        kind, problem, must_exit = failure_of(error), str(error), isinstance(error, DeviceLostError)
    except Exception as error:  # noqa: BLE001 - the server must learn the reason
        traceback.print_exc()
        kind, problem, must_exit = "failed", f"{type(error).__name__}: {error}", True
    return Ended(message.job_id, kind, problem, tuple(engine.loaded.resident()), engine.memory()), must_exit
