"""Makes an image again in a process that has held no other model, and compares the pixels. No torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelight.catalog.catalog import Catalog
from safelight.errors import RequestError, SafelightError
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.request.stored import read_request
from safelight.resolve.contents import find_model
from safelight.resolve.resolve import resolve
from safelight.workers.messages import Ended, Generate, Made
from safelight.workers.supervisor import Process

if TYPE_CHECKING:
    # The queue imports SQLAlchemy, which an engine does not need.
    from safelight.queue.stored_image import StoredImage


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison. ``same``: the pixels are equal. ``pixels_sha256``: of the fresh process's image."""

    same: bool
    pixels_sha256: str


class FreshProcesses:
    """Makes images in fresh processes, one at a time, because each process holds its own copy of a model.

    command: starts a process.
    settings: the process opens its engine with them.
    catalog: where the contents of requests are found.
    """

    def __init__(self, command: Sequence[str], settings: object, catalog: Catalog) -> None:
        self._command = command
        self._settings = settings
        self._catalog = catalog
        self._one_at_a_time = threading.Lock()
        self._process_lock = threading.Lock()
        self._process: Process | None = None
        self._closed = False

    def compare(self, image: StoredImage) -> Comparison:
        """Make the image again from its metadata, in a new process, and compare the pixels.

        Raises:
            RequestError: this version cannot read the request in the metadata, or the image's pixels are not known.
            WorkerDiedError: the process died.
            SafelightError: the process failed, another fresh process is running, or the server is stopping.
        """
        try:
            request = read_request(image.metadata["request"], image.metadata["version"])
        except (KeyError, TypeError) as error:
            raise RequestError(
                "image", image.id, f"this version cannot read the request in its metadata ({error})"
            ) from error
        if not image.pixels_sha256:
            raise RequestError("image", image.id, "its file has other pixels than were made (JPEG, lossy WebP)")
        pixels = self.make_first_image(request, image.model_digest).pixels_sha256
        return Comparison(pixels == image.pixels_sha256, pixels)

    def make_first_image(self, request: Request, digest: str) -> Image:
        """Make the first image of a request in a new process, by the model with that digest.

        Raises:
            WorkerDiedError: the process died.
            SafelightError: the process failed, another fresh process is running, or the server is stopping.
        """
        if not self._one_at_a_time.acquire(blocking=False):
            raise SafelightError("a fresh process is already making an image; try again when it has ended")
        try:
            # By its content, because it may have been renamed since.
            model = find_model(request.model, digest, self._catalog.library)
            job = resolve(request, self._catalog, model=model)
            process = self._start()
            try:
                return _first_image(process, self._settings, Generate("fresh", job, 0, ()))
            finally:
                process.kill()
        finally:
            self._one_at_a_time.release()

    def _start(self) -> Process:
        with self._process_lock:
            if self._closed:
                raise SafelightError("the server is stopping")
            self._process = Process(self._command)
            return self._process

    def close(self) -> None:
        """End the running process, and start no other."""
        with self._process_lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()


def _first_image(process: Process, settings: object, generate: Generate) -> Image:
    process.open(settings)
    process.send(generate)
    image: Image | None = None
    while (message := process.inbox.get()) is not None:
        if isinstance(message, Made) and image is None:
            image = message.image
        elif isinstance(message, Ended):
            if message.kind != "done" or image is None:
                raise SafelightError(f"the fresh process failed: {message.problem}")
            return image
    raise process.death_error()
