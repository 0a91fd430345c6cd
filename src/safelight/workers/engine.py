"""The Engine protocol: it makes images, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from safelight.request.results import Image, OnProgress
from safelight.request.schema import Request


def ignore(_: object) -> None:
    """A progress callback that does nothing."""


class Engine(Protocol):
    """Makes the images of requests. Each request names its model."""

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """Make the request's images, in the order of their seeds.

        Raises:
            InputError: the request cannot be fulfilled.
            IntegrityError: a model's file changed.
            Cancelled: ``on_progress`` raised it.
        """
        ...
