"""The engine in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from safelight.catalog.adapters import Adapters
from safelight.catalog.catalog import Catalog
from safelight.catalog.library import Library
from safelight.catalog.model import Model
from safelight.devices.base import wants_one_thread
from safelight.errors import IntegrityError, RequestError
from safelight.families.registry import families
from safelight.memory.residency import Residency
from safelight.pipeline import components, fit, run
from safelight.pipeline.combine import combine
from safelight.pipeline.compact import keep_compact
from safelight.pipeline.repair import ImageRepairer
from safelight.pipeline.resources import Resources
from safelight.request.job import Job
from safelight.request.results import Image, OnProgress
from safelight.request.run_settings import Precision, RunSettings
from safelight.request.schema import Request
from safelight.resolve.contents import Contents, find_contents
from safelight.resolve.resolve import resolve
from safelight.workers.engine import ignore
from safelight.workers.loaded_models import LoadedModels

OnSwitch = Callable[[Model, Resources], None]
"""Called before an image whose model differs from that of the last image. If it raises, the job fails."""

DecideRunSettings = Callable[[Precision, Model], RunSettings]
"""Returns the run settings for a precision and a model; the same ones for every job of this process."""


REPORT_SECONDS = 0.2
"""Seconds between two reports of the memory in progress messages. One lists every segment, so it has tens of kB."""


class SpacedReports:
    """Reports the memory as ``report`` does, or returns None if the last report is younger than REPORT_SECONDS."""

    def __init__(self, report: Callable[[], Mapping[str, Any]]) -> None:
        self._report, self._last = report, 0.0

    def __call__(self) -> Mapping[str, Any] | None:
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return None
        self._last = now
        return self._report()


class LocalEngine:
    """Makes images in this process, one at a time. Thread-safe: threads wait for each other.

    resources: the caches, the memory and the run settings; each job replaces the run settings.
    decide: returns the run settings of a job.
    report: returns the memory of each place, see :meth:`memory`.
    tiers: all residencies, the host's first.

    The attribute ``on_switch`` may be set, for example to a canary. The attribute ``loaded`` loads, pins and unloads
    models.
    """

    def __init__(
        self,
        library: Library,
        resources: Resources,
        decide: DecideRunSettings,
        report: Callable[[], Mapping[str, Any]],
        tiers: Sequence[Residency],
    ) -> None:
        self.library = library
        self.resources = replace(resources, report=SpacedReports(report))
        self._decide_settings = decide
        self._report = report
        self.tiers = tuple(tiers)
        self.catalog = Catalog(library, Adapters(library.root), resources.inputs)
        self.image_repairer = ImageRepairer(tiers, library.root, resources.embedding_cache)
        self.on_switch: OnSwitch | None = None
        self._last = ""
        self._lock = threading.RLock()
        # Elsewhere, models load while an image is made.
        self._turn = self._lock if wants_one_thread(resources.device) else contextlib.nullcontext()
        self.loaded = LoadedModels(library, self.resources, self.resources_for, self.tiers, self._turn)

    def generate(self, request: Request, on_progress: OnProgress = ignore) -> Iterator[Image]:
        """See :class:`safelight.workers.engine.Engine`. The request is resolved now, not when the iteration begins."""
        model = self._check_files(self.library.find(request.model))
        return self._start(resolve(request, self.catalog, model=model), model, on_progress)

    def resolve(self, request: Request) -> Job:
        """Resolve a request against this engine's library, whose models and adapters may be named by their paths."""
        return resolve(request, self.catalog, model=self._check_files(self.library.find(request.model)))

    def run(
        self, job: Job, on_progress: OnProgress = ignore, upcoming: Sequence[str] = (), first: int = 0
    ) -> Iterator[Image]:
        """Make the images of a job.

        upcoming: the names of the models of the next jobs, the soonest first.
        first: the first image to make, counted from 0.

        Raises IntegrityError if content of the job is gone or changed.
        """
        return self._start(job, self._find_model(job), on_progress, upcoming, first)

    def _start(
        self, job: Job, model: Model, on_progress: OnProgress, upcoming: Sequence[str] = (), first: int = 0
    ) -> Iterator[Image]:
        contents = find_contents(job, self.catalog, model)
        settings = self._decide(job.request.precision, model)
        resources = replace(self.resources, run_settings=settings, upcoming=self._component_keys(upcoming, settings))
        contents = _with_compact_refiner(contents, resources)
        self.loaded.mark_used(model, settings)
        return self._images(contents, resources, on_progress, first)

    def _find_model(self, job: Job) -> Model:
        """Find the job's model by its content, also if it was renamed meanwhile. Raises IntegrityError."""
        reference = job.model
        content = reference.digest, reference.prediction_type
        found = self.library.find_by_name(reference.name)
        if found is None or (found.digest, found.prediction_type) != content or found.manifest.changed_files():
            # The search reads the records of all files that were used by their path.
            found = self.library.find_by_digest(*content, reference.name)
        if found is None:
            path = self.library.find(reference.name).path
            remedy = "Send the request again to use the model as it is now."
            raise IntegrityError(path, "", "its content changed after the job was accepted", remedy)
        return self._check_files(found)

    def _images(self, contents: Contents, resources: Resources, on_progress: OnProgress, first: int) -> Iterator[Image]:
        """Make the images. The lock is free between two of them, so that several jobs may take turns."""
        for index in range(first, contents.job.request.count):
            with self._lock:
                self._call_on_switch(contents.model, resources)
                model = keep_compact(self._combine(contents), resources)
                make = partial(run.make_image, contents, model, index=index, on_progress=on_progress)
                try:
                    image = self.image_repairer.make_and_repair(make, model, resources)
                except IntegrityError:
                    # Either one read went wrong, or the files changed. If they changed, this raises and the model is
                    # not used again.
                    contents = self._read_again(contents, resources)
                    model = keep_compact(self._combine(contents), resources)
                    with self.loaded.without_pin(model.name):
                        self.image_repairer.verify_and_evict(model)
                    resources.embedding_cache.clear()
                    make = partial(run.make_image, contents, model, index=index, on_progress=on_progress)
                    image = self.image_repairer.make_and_repair(make, model, resources)
            yield image

    def _read_again(self, contents: Contents, resources: Resources) -> Contents:
        """Read and check the files of a job's contents again. Raises IntegrityError if they changed."""
        model = self.library.recheck_after_corruption(contents.model)
        if contents.refiner is not None:
            self.library.recheck_after_corruption(contents.refiner)
        for adapter in contents.adapters:
            self.catalog.adapters.verify(adapter)
        return _with_compact_refiner(find_contents(contents.job, self.catalog, model), resources)

    def _call_on_switch(self, model: Model, resources: Resources) -> None:
        """Call ``on_switch`` if another model made the last image."""
        if model.digest != self._last and self.on_switch is not None:
            self._last = ""
            self.on_switch(model, resources)
        self._last = model.digest

    def _combine(self, contents: Contents) -> Model:
        return combine(contents, lambda component: self.tiers[0].lease(component, torch.float32))

    def _check_files(self, model: Model) -> Model:
        """Check that the model's files are those that were added. If not, raise IntegrityError now and at each later
        use."""
        try:
            return self.library.ensure_unchanged(model)
        except IntegrityError:
            return self.library.recheck_after_corruption(model)

    def _component_keys(self, names: Sequence[str], settings: RunSettings) -> tuple[str, ...]:
        """The component keys of those named models that the library has, in the order of use."""
        models = [self.library.find_by_name(name) for name in names]
        known = [model for model in models if model is not None and model.base in families()]
        forms = (keep_compact(model, self.resources, settings) for model in known)
        return tuple(key for model in forms for key in components.component_keys(model, settings))

    def _decide(self, precision: Precision, model: Model) -> RunSettings:
        # The device may be tried for it.
        with self._turn:
            return self._decide_settings(precision, model)

    def resources_for(self, model: Model, precision: Precision = "auto") -> Resources:
        """Return the resources of a generation by ``model``, with its final run settings."""
        return replace(self.resources, run_settings=self._decide(precision, model))

    def memory(self) -> Mapping[str, Any]:
        """The state of memory as plain values; sizes in bytes.

        For each place: the budget and its origin, the stored and the reserved bytes, what is resident and who holds
        it. Also the ledger's entries, and the form of each quantised component (``forms``).
        """
        return {**self._report(), "forms": dict(self.resources.forms)}

    def prepare_to_fork(self, job: Job) -> None:
        """Prepare this process to fork children that make images of such jobs. Compute nothing.

        Read the model's weights, protect them against writing, and build its skeletons.

        Raises:
            IntegrityError: the model's content is not that of the job.
            RequestError: the device is not the CPU.
        """
        model = self._find_model(job)
        if self.resources.device.has_own_memory:
            name = self.resources.device.name
            raise RequestError("isolate", True, f"processes can share weights only on the CPU, not on {name}")
        resources = self.resources_for(model, job.request.precision)
        model = keep_compact(self._combine(find_contents(job, self.catalog, model)), resources)
        components.preload(model, resources)
        components.build_skeletons(model, resources, job.request.seamless)
        for tier in self.tiers:
            if not tier.device.has_own_memory:
                tier.seal()

    def fits(self, request: Request, model: Model) -> dict[str, Any]:
        """Report whether ``model`` can make the image, and how: see :func:`safelight.pipeline.fit.describe_fit`."""
        resources = self.resources_for(model, request.precision)
        return fit.describe_fit(request, keep_compact(model, resources), resources)

    def close(self) -> None:
        """End all pins, evict all models, and discard their modules."""
        self.loaded.close()
        self.resources.skeletons.clear()


def _with_compact_refiner(contents: Contents, resources: Resources) -> Contents:
    """Return a job's contents, with the refiner in the form in which its weights are in memory."""
    if contents.refiner is None:
        return contents
    return replace(contents, refiner=keep_compact(contents.refiner, resources))
