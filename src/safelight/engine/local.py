"""The engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from safelight.engine.base import ignore
from safelight.engine.repair import Repairs
from safelight.errors import IntegrityError, ModelNotFoundError, RequestError
from safelight.generate import fit, resident, run
from safelight.generate.bench import Bench
from safelight.generate.check import check
from safelight.generate.combine import combined
from safelight.library.adapters import Adapters
from safelight.library.chosen import Settled, Shelves, settled
from safelight.library.library import Library
from safelight.library.model import Model
from safelight.memory.residency import Residency
from safelight.request.results import Image, OnProgress
from safelight.request.run_settings import Precision, RunSettings
from safelight.request.schema import Request

OnSwitch = Callable[[Model, Bench], None]
"""Told when a job uses another model than the last, before its first image; what it raises fails the job."""

Decide = Callable[[Precision, Model], RunSettings]
"""The run settings for a model in a precision; the same for every job of this process."""


class LocalEngine:
    """Makes images one at a time. Safe to be called from several threads: they wait for each other.

    ``bench`` is what it works with; its run settings are replaced for each job. ``report`` says what is where;
    ``tiers`` are all the places in which models are kept. ``on_switch`` may be set: a canary.
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
        self.shelves = Shelves(library, Adapters(library.root), bench.inputs)
        self.repairs = Repairs(tiers, library.root, bench.conditionings)
        self.on_switch: OnSwitch | None = None
        self._last = ""
        self._lock = threading.RLock()
        self._pins: dict[str, ExitStack] = {}
        self._used: dict[str, tuple[str, ...]] = {}

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.engine.base.Engine`. The model is resolved now, and pinned to this request."""
        return self.generate_pinned(request, None, (), on_progress)

    def generate_pinned(
        self,
        request: Request,
        digest: str | None,
        upcoming: Sequence[str],
        on_progress: OnProgress = ignore,
        first: int = 0,
    ) -> Iterator[Image]:
        """The same from image ``first`` on, with the content ``digest`` or not at all (IntegrityError); the models
        named in ``upcoming`` will be wanted next, the soonest first."""
        model = self._sound(self._meant(request.model, digest))
        if digest is not None and model.digest != digest:
            raise IntegrityError(model.path, "", "its content is another than when the job was accepted")
        asked = settled(request, model, self.shelves)
        request = asked.request
        settings = self._decide(request.precision, model)
        bench = replace(self.bench, run=settings, upcoming=self._keys(upcoming, settings))
        check(request, model, asked.words)
        self._used.pop(model.digest, None)
        self._used[model.digest] = resident.component_keys(model, settings)
        return self._locked(self._images(asked, model, bench, on_progress, first))

    def _meant(self, name: str, digest: str | None) -> Model:
        """The model of that name; of that content where the name is gone, because it was renamed meanwhile."""
        try:
            return self.library.resolve(name)
        except ModelNotFoundError:
            same = next((card.name for card in self.library.cards() if card.digest == digest), None)
            if same is None:
                raise
            return self.library.get(same)

    def _images(
        self, asked: Settled, model: Model, bench: Bench, on_progress: OnProgress, first: int
    ) -> Iterator[Image]:
        request = asked.request
        for index in range(first, request.count):
            # Before each image: the images of several jobs may be taken in turns.
            self._switched(model, bench)
            try:
                yield self._image(asked, self._under(model, asked), bench, index, on_progress)
            except IntegrityError:
                # Read wrongly once, or is the file no longer the checkpoint's? Then it is not used again.
                model = self.library.mended(model)
                for adapter in asked.adapters:
                    self.shelves.adapters.verify(adapter)
                again = settled(request, model, self.shelves)
                under = self._under(model, again)
                self.repairs.reload(under)
                bench.conditionings.clear()
                yield self._image(again, under, bench, index, on_progress)

    def _switched(self, model: Model, bench: Bench) -> None:
        """Look at what ``on_switch`` looks at when the last image was another model's."""
        if model.digest != self._last and self.on_switch is not None:
            self._last = ""
            self.on_switch(model, bench)
        self._last = model.digest

    def _under(self, model: Model, asked: Settled) -> Model:
        return combined(model, asked, lambda component: self.tiers[0].lease(component, torch.float32))

    def _image(self, asked: Settled, model: Model, bench: Bench, index: int, on_progress: OnProgress) -> Image:
        return self.repairs.made(lambda bench: run.image(asked, model, bench, index, on_progress), model, bench)

    def _sound(self, model: Model) -> Model:
        """The model, if its files are those that were added. Raises IntegrityError, from then on at once."""
        try:
            return self.library.checked(model)
        except IntegrityError:
            return self.library.mended(model)

    def _keys(self, names: Sequence[str], settings: RunSettings) -> tuple[str, ...]:
        """The components of models that can be had, in the order in which they will be used."""
        found = [self.library.find_named(name) for name in names]
        return tuple(key for model in found if model is not None for key in resident.component_keys(model, settings))

    def _locked(self, images: Iterator[Image]) -> Iterator[Image]:
        while True:
            with self._lock:
                image = next(images, None)
            if image is None:
                return
            yield image

    def bench_for(self, model: Model, precision: Precision = "auto") -> Bench:
        """What a generation by that model works with, in the end: its run settings are decided."""
        return replace(self.bench, run=self._decide(precision, model))

    def memory(self) -> Mapping[str, Any]:
        """What is where: for each place its budget and what set it, what is stored and promised, what is resident and
        who holds it, and the ledger's entries. Sizes are bytes."""
        return self._report()

    def prefetch(self, name: str) -> bool:
        """Bring a model's components into memory as far as there is room beside everything that is there now; whether
        all of it is there."""
        model = self.library.resolve(name)
        return resident.prefetch(model, self.bench_for(model))

    def resident(self) -> list[str]:
        """The digests of models that were used and are whole in memory where it computes, the last used first."""
        holdings = self.bench.residency.holdings()
        whole = {holding.component for holding in holdings if holding.nbytes >= holding.total}
        used = list(reversed(list(self._used.items())))
        return [digest for digest, keys in used if whole.issuperset(keys)]

    def pin(self, name: str) -> None:
        """Bring a model and hold it, so that nothing else takes its place, until :meth:`unpin`. Raises OutOfMemoryError
        when it does not fit whole."""
        model = self.library.checked(self.library.resolve(name))
        self.unpin(name)
        self._pins[name] = resident.pinned(model, self.bench_for(model))

    def unpin(self, name: str) -> None:
        """Hold the model no longer."""
        held = self._pins.pop(name, None)
        if held is not None:
            held.close()

    def unload(self, digest: str | None) -> None:
        """Drop what nobody holds: of the model of that digest, or of all; and what text encoders made."""
        self.bench.conditionings.clear()
        known = next((card.name for card in self.library.cards() if card.digest == digest), None)
        model = None if known is None else self.library.find_named(known)
        for tier in self.tiers:
            if digest is None:
                tier.drop()
            elif model is not None:
                for component in model.manifest.components:
                    tier.drop(component.digest)

    def make_resident(self, model: Model) -> None:
        """Bring a model's components into memory, as far as they fit, without making an image."""
        resident.preload(self.library.checked(model), self.bench_for(model))

    def share(self, request: Request, digest: str) -> None:
        """Make ready for forks that make images of such requests, computing nothing: the model's weights are read and
        become unwritable, its skeletons are built. Raises IntegrityError when its content is not ``digest``."""
        model = self._sound(self.library.resolve(request.model))
        if model.digest != digest:
            raise IntegrityError(model.path, "", "its content is another than when the job was accepted")
        if self.bench.device.separate:
            name = self.bench.device.name
            raise RequestError("isolate", True, f"processes share weights where the CPU computes, not on {name}")
        bench = self.bench_for(model, request.precision)
        model = self._under(model, settled(request, model, self.shelves))
        resident.preload(model, bench)
        resident.prepare(model, bench, request.seamless)
        for tier in self.tiers:
            if not tier.device.separate:
                tier.seal()

    def fits(self, request: Request, model: Model) -> dict[str, Any]:
        """Whether ``model`` can make the image that is asked for, and how: see :func:`safelight.generate.fit.fits`."""
        return fit.fits(request, model, self.bench_for(model, request.precision))

    def close(self) -> None:
        """Let go of every model that is held, and drop all."""
        for name in list(self._pins):
            self.unpin(name)
        for tier in self.tiers:
            tier.drop()
