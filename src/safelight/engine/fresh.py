"""An image made again in a process that has held no other model, and whether it is the same. No torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.engine.messages import Ended, Generate, Made
from safelight.engine.supervisor import Process
from safelight.errors import RequestError, SafelightError
from safelight.storage.db import StoredImage
from safelight.types import Request

_one = threading.Lock()
"""One such process at a time: each holds a model of its own."""


@dataclass(frozen=True, slots=True)
class Compared:
    """``same``: whether the pixels are the same; ``pixels_sha256``: those of the fresh process."""

    same: bool
    pixels_sha256: str


def compared(command: Sequence[str], settings: object, image: StoredImage) -> Compared:
    """Make the image again from its metadata, in a new process.

    Raises RequestError when its metadata is of another form, WorkerDiedError, and SafelightError with what failed.
    """
    try:
        asked = Request(**image.metadata["request"])
    except (KeyError, TypeError) as error:
        raise RequestError(
            "image", image.id, f"its metadata has no request that this version reads ({error})"
        ) from error
    if not _one.acquire(blocking=False):
        raise SafelightError("another image is being made again in a fresh process; ask when that is done")
    try:
        process = Process(command)
        try:
            process.open(settings)
            process.send(Generate("fresh", asked, image.model_digest, 0, ()))
            pixels = ""
            while (message := process.inbox.get()) is not None:
                if isinstance(message, Made):
                    pixels = message.image.pixels_sha256
                elif isinstance(message, Ended):
                    if message.kind != "done":
                        raise SafelightError(f"the fresh process failed: {message.problem}")
                    return Compared(pixels == image.pixels_sha256, pixels)
            raise process.died()
        finally:
            process.kill()
    finally:
        _one.release()
