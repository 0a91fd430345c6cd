"""An image made again in a process that has held no other model, and whether it is the same. No torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.engine.messages import Ended, Generate, Made
from safelight.engine.supervisor import Process
from safelight.errors import RequestError, SafelightError
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.request.stored import read_request
from safelight.storage.db import StoredImage


@dataclass(frozen=True, slots=True)
class Compared:
    """``same``: whether the pixels are the same; ``pixels_sha256``: those of the fresh process."""

    same: bool
    pixels_sha256: str


class Fresh:
    """Makes images again, one at a time, as each such process holds a model of its own. ``command`` starts a process,
    ``settings`` are what it opens its engine with."""

    def __init__(self, command: Sequence[str], settings: object) -> None:
        self._command = command
        self._settings = settings
        self._one = threading.Lock()
        self._changing = threading.Lock()
        self._process: Process | None = None
        self._closed = False

    def compared(self, image: StoredImage) -> Compared:
        """Make the image again from its metadata, in a new process.

        Raises RequestError when its metadata is of another form, WorkerDiedError, and SafelightError with what failed.
        """
        try:
            asked = read_request(image.metadata["request"], image.metadata["version"])
        except (KeyError, TypeError) as error:
            raise RequestError(
                "image", image.id, f"its metadata has no request that this version reads ({error})"
            ) from error
        pixels = self.made(asked, image.model_digest).pixels_sha256
        return Compared(pixels == image.pixels_sha256, pixels)

    def made(self, request: Request, digest: str) -> Image:
        """The first image of a request, by the model of that digest, made in a new process.

        Raises WorkerDiedError, and SafelightError with what failed.
        """
        if not self._one.acquire(blocking=False):
            raise SafelightError("another image is being made again in a fresh process; ask when that is done")
        try:
            process = self._started()
            try:
                return _image(process, self._settings, Generate("fresh", request, digest, 0, ()))
            finally:
                process.kill()
        finally:
            self._one.release()

    def _started(self) -> Process:
        with self._changing:
            if self._closed:
                raise SafelightError("the server stops")
            self._process = Process(self._command)
            return self._process

    def close(self) -> None:
        """End the process that is at work; start no other."""
        with self._changing:
            self._closed = True
            if self._process is not None:
                self._process.kill()


def _image(process: Process, settings: object, wanted: Generate) -> Image:
    process.open(settings)
    process.send(wanted)
    image: Image | None = None
    while (message := process.inbox.get()) is not None:
        if isinstance(message, Made) and image is None:
            image = message.image
        elif isinstance(message, Ended):
            if message.kind != "done" or image is None:
                raise SafelightError(f"the fresh process failed: {message.problem}")
            return image
    raise process.died()
