"""The engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from safelight.arch.skeleton import SkeletonCache
from safelight.engine.base import ignore
from safelight.generate import run
from safelight.library.library import Library
from safelight.memory.residency import Residency
from safelight.types import Image, OnProgress, Precision, Request, RunSettings

Decide = Callable[[Precision], RunSettings]
"""The run settings for a precision; the same for every job of this process."""


class LocalEngine:
    """Makes images one at a time. Safe to be called from several threads: they wait for each other."""

    def __init__(self, library: Library, residency: Residency, decide: Decide) -> None:
        self.library = library
        self.residency = residency
        self.skeletons = SkeletonCache()
        self._decide = decide
        self._lock = threading.RLock()

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.engine.base.Engine`. The model is resolved now, and pinned to this request."""
        model = self.library.checked(self.library.resolve(request.model))
        bench = run.Bench(self.residency, self.skeletons, self._decide(request.precision))
        run.check(request, model)
        return self._locked(run.images(request, model, bench, on_progress))

    def _locked(self, images: Iterator[Image]) -> Iterator[Image]:
        while True:
            with self._lock:
                image = next(images, None)
            if image is None:
                return
            yield image

    def close(self) -> None:
        """Drop every model."""
        self.residency.drop()
