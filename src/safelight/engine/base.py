"""The Engine: what makes images, whether in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from safelight.request.results import Image, OnProgress
from safelight.request.schema import Request


def ignore(_: object) -> None:
    """A progress callback that does nothing."""


class Engine(Protocol):
    """Makes the images of requests; each request names its model."""

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """The request's images in the order of their seeds.

        Raises InputError for what cannot be done, IntegrityError when a model's file changed, Cancelled when
        ``on_progress`` raised it.
        """
        ...
