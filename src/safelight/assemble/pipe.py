"""What the processes that compute for others have in common: their end of the pipe, and how a job is carried out."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from safelight.engine.messages import Ended, FromWorker, Generate, Made, Progressed
from safelight.errors import Cancelled, DeviceLostError, InputError, SafelightError
from safelight.request.results import Progress

if TYPE_CHECKING:
    from safelight.engine.local import LocalEngine


class Pipe:
    """``connection``: to whoever asks. When that is gone, the process leaves at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def say(self, message: FromWorker) -> None:
        """Safe to be called from several threads."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def hear(self) -> object:
        """The next message."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)


def carried_out(engine: LocalEngine, job: Generate, pipe: Pipe, stopped: Callable[[], bool]) -> tuple[Ended, bool]:
    """Make a job's images and say each; how it ended, and whether the process had better leave: something failed that
    nobody has foreseen, or the device is gone."""

    def on_progress(progress: Progress) -> None:
        if stopped():
            raise Cancelled
        pipe.say(Progressed(job.job, progress))

    kind, problem, leave = "done", "", False
    try:
        if stopped():
            raise Cancelled
        images = engine.generate_pinned(job.request, job.digest, job.upcoming, on_progress, job.first)
        for place, image in enumerate(images, job.first):
            pipe.say(Made(job.job, place, image))
    except Cancelled:
        kind = "cancelled"
    except InputError as error:
        kind, problem = "input", str(error)
    except DeviceLostError as error:
        kind, problem, leave = "device", str(error), True
    except SafelightError as error:
        kind, problem = "failed", str(error)
    except Exception as error:  # noqa: BLE001 - whoever asked must hear why
        traceback.print_exc()
        kind, problem, leave = "failed", f"{type(error).__name__}: {error}", True
    return Ended(job.job, kind, problem, tuple(engine.resident())), leave
