"""The engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from safelight.engine.base import ignore
from safelight.generate import fit, run
from safelight.generate.run import Bench
from safelight.library.library import Library
from safelight.library.model import Model
from safelight.memory.residency import Residency
from safelight.types import Image, OnProgress, Precision, Request, RunSettings

Decide = Callable[[Precision], RunSettings]
"""The run settings for a precision; the same for every job of this process."""


class LocalEngine:
    """Makes images one at a time. Safe to be called from several threads: they wait for each other.

    ``bench`` is what it works with; its run settings are replaced for each job. ``report`` says what is where;
    ``tiers`` are all the places in which models are kept.
    """

    def __init__(
        self,
        library: Library,
        bench: Bench,
        decide: Decide,
        report: Callable[[], Mapping[str, Any]],
        tiers: Sequence[Residency],
    ) -> None:
        self.library = library
        self.bench = replace(bench, report=report)
        self._decide = decide
        self._report = report
        self.tiers = tuple(tiers)
        self._lock = threading.RLock()

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.engine.base.Engine`. The model is resolved now, and pinned to this request."""
        model = self.library.checked(self.library.resolve(request.model))
        bench = replace(self.bench, run=self._decide(request.precision))
        run.check(request, model)
        return self._locked(run.images(request, model, bench, on_progress))

    def _locked(self, images: Iterator[Image]) -> Iterator[Image]:
        while True:
            with self._lock:
                image = next(images, None)
            if image is None:
                return
            yield image

    def memory(self) -> Mapping[str, Any]:
        """What is where: for each place its budget and what set it, what is stored and promised, what is resident and
        who holds it, and the ledger's entries. Sizes are bytes."""
        return self._report()

    def make_resident(self, model: Model) -> None:
        """Bring a model's components into memory, as far as they fit, without making an image."""
        run.preload(self.library.checked(model), replace(self.bench, run=self._decide("auto")))

    def fits(self, request: Request, model: Model) -> dict[str, Any]:
        """Whether ``model`` can make the image that is asked for, and how: see :func:`safelight.generate.fit.fits`."""
        return fit.fits(request, model, replace(self.bench, run=self._decide(request.precision)))

    def close(self) -> None:
        """Drop every model."""
        for tier in self.tiers:
            tier.drop()
