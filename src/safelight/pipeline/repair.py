"""Repairs an image that a gate stopped: tries each possible cause once, until the image passes.

The cheapest attempt comes first:

1. Compare the bytes in memory with their checksums.
2. Read the weights from the file again.
3. Copy synchronously.
4. Compute with the reference attention.

The image's metadata records what was wrong, what helped, and the run settings of the attempt that passed. A file counts
what helped, so that ``safelight doctor`` can suggest a setting. Repair itself changes no setting, because a setting
that changes pixels must not change silently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from safelight.catalog.model import Model
from safelight.devices import machine, measurements
from safelight.errors import NotFiniteError, shortened
from safelight.logs import Log
from safelight.memory.residency import Residency
from safelight.pipeline.conditioning import EmbeddingCache
from safelight.pipeline.resources import Resources
from safelight.pipeline.stages import clear_frames
from safelight.request.results import Image, Repair
from safelight.weights.overlay import digests

_log = Log(__name__)

Suspect = Literal["loading", "state", "attention", "memory"]
Make = Callable[[Resources], Image]

REFERENCE = "normal"
"""The attention that uses only matrix products and a softmax."""

COUNTS_FILE = "repairs.json"

SETTINGS: Mapping[str, str] = {
    "attention": "attention_type normal",
    "memory": "verify_transfers always",
}
"""By suspect: the setting that may help permanently, as an argument of ``safelight config set``."""


@dataclass(frozen=True, slots=True)
class _Try:
    """One attempt.

    ``resources``: for this attempt.
    ``remedy``: the text that is recorded if this attempt succeeds.
    ``found``: the evidence against the suspect, if there is any.
    """

    suspect: Suspect
    resources: Resources
    remedy: str
    found: str = ""


class ImageRepairer:
    """Repairs the images of one engine.

    tiers: the residencies that hold models, the device's last.
    folder: for the file that counts what helped.
    embedding_cache: the cache of text-encoder outputs; wrong weights may have produced some of them.
    """

    def __init__(self, tiers: Sequence[Residency], folder: Path, embedding_cache: EmbeddingCache) -> None:
        self._tiers = tuple(tiers)
        self._embedding_cache = embedding_cache
        self._path = folder / COUNTS_FILE

    def make_and_repair(self, make: Make, model: Model, resources: Resources) -> Image:
        """Call ``make``, and repair the image if a gate stops it. Raises the first NotFiniteError if nothing helps."""
        try:
            image = make(resources)
        except NotFiniteError as error:
            first = error
        else:
            for repair in image.metadata["repairs"]:
                self._count(Repair(**repair))
            return image
        clear_frames(first)
        for attempt in self._attempts(model, resources):
            _log.warning("repairing an image", why=str(first), suspect=attempt.suspect, attempt=attempt.remedy)
            try:
                image = make(attempt.resources)
            except NotFiniteError as error:
                clear_frames(error)
                continue
            return self._repaired(image, Repair(attempt.suspect, attempt.found or str(first), attempt.remedy))
        raise first

    def _attempts(self, model: Model, resources: Resources) -> Iterator[_Try]:
        if corrupted := self.check(model):
            yield _Try("memory", resources, "read again", f"bytes in memory had changed: {shortened(corrupted)}")
        self._drop(model)
        yield _Try("loading", resources, "read again from its file")
        if resources.device.asynchronous:
            with self._synchronous(resources):
                self._drop(model)
                yield _Try("memory", resources, "copied without asynchronous copies")
        if resources.run_settings.attention != REFERENCE:
            with_reference = replace(
                resources,
                run_settings=replace(resources.run_settings, attention=REFERENCE, attention_slice_size="auto"),
            )
            yield _Try("attention", with_reference, f"computed with attention_type: {REFERENCE}")

    def check(self, model: Model | None = None) -> list[str]:
        """Compare the bytes in memory with their checksums, for one model or for all.

        Returns the names of what was wrong; the next use reads it again.
        """
        known = None if model is None else _digests(model)
        wrong = [label for tier in self._tiers for label in tier.check(known)]
        if wrong:
            self._embedding_cache.clear()
        return wrong

    def verify_and_evict(self, model: Model) -> None:
        """Verify a model's bytes in memory, count what was wrong, and evict them. The next use reads them again."""
        if corrupted := self.check(model):
            self._count(Repair("memory", f"bytes in memory had changed: {shortened(corrupted)}", "read again"))
        self._drop(model)

    def _drop(self, model: Model) -> None:
        for tier in self._tiers:
            for digest in _digests(model):
                tier.drop(digest)
        machine.trim_allocator()

    @contextmanager
    def _synchronous(self, resources: Resources) -> Generator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, resources.device, "asynchronous", resources.device.asynchronous)
            resources.device.asynchronous = False
            yield

    def _repaired(self, image: Image, repair: Repair) -> Image:
        self._count(repair)
        metadata = {**image.metadata, "repairs": [*image.metadata["repairs"], asdict(repair)]}
        return replace(
            image, metadata=metadata, warnings=(*image.warnings, f"repaired: {repair.wrong}; {repair.helped}")
        )

    def _count(self, repair: Repair) -> None:
        before = measurements.read(self._path, repair.helped).get("times", 0)
        values = {"times": before + 1, "suspect": repair.suspect, "last": repair.wrong}
        measurements.keep(self._path, repair.helped, values)


def _digests(model: Model) -> list[str]:
    """Return the digests of everything in memory for a model: its components and the sources of their overlays."""
    return [digest for component in model.manifest.components for digest in digests(component)]
