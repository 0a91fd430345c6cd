"""Repair: when a gate trips, what can be wrong is tried in turn, once each, until the image passes.

The order is that of the cheapest proof: the digests of what is in memory; the weights read anew from the file; copies
that wait for each other; the reference attention. The image then says what was wrong and what helped, and its run
settings are those that it was made with in the end. What helped is counted, so that ``safelight doctor`` can suggest a
setting; nothing that changes a pixel is set in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import structlog

from safelight.devices import kept, machine
from safelight.errors import NotFiniteError, shortened
from safelight.generate.bench import Bench
from safelight.generate.conditioning import Conditionings
from safelight.generate.stages import let_go
from safelight.library.model import Model
from safelight.memory.residency import Residency
from safelight.request.results import Image, Repair
from safelight.weights.overlay import digests

_log = structlog.get_logger(__name__)

Suspect = Literal["loading", "state", "attention", "memory"]
Make = Callable[[Bench], Image]

REFERENCE = "normal"
"""The attention that is nothing but matrix products and a softmax."""

COUNTS = "repairs.json"

SETTINGS: Mapping[str, str] = {
    "attention": "attention_type normal",
    "memory": "verify_transfers always",
}
"""What may help for good, by suspect, as ``safelight config set`` takes it."""


@dataclass(frozen=True, slots=True)
class _Try:
    """``bench`` to try with, ``found``: what was found to be wrong, if anything was; ``helped``: what it means if this
    image passes."""

    suspect: Suspect
    bench: Bench
    helped: str
    found: str = ""


class Repairs:
    """Repairs the images of one engine. ``tiers``: the places in which models are kept, the device's last; ``folder``:
    where it is counted what helped; ``conditionings``: what may have been made with what was wrong."""

    def __init__(self, tiers: Sequence[Residency], folder: Path, conditionings: Conditionings) -> None:
        self._tiers = tuple(tiers)
        self._conditionings = conditionings
        self._path = folder / COUNTS

    def made(self, make: Make, model: Model, bench: Bench) -> Image:
        """The image that ``make`` makes; when a gate trips, what repair makes of it. Raises the first NotFiniteError
        when nothing helps."""
        try:
            image = make(bench)
        except NotFiniteError as error:
            first = error
        else:
            for repair in image.metadata["repairs"]:
                self._count(Repair(**repair))
            return image
        let_go(first)
        for attempt in self._attempts(model, bench):
            _log.warning("an image is made again", why=str(first), suspect=attempt.suspect, helps=attempt.helped)
            try:
                image = make(attempt.bench)
            except NotFiniteError as error:
                let_go(error)
                continue
            return self._repaired(image, Repair(attempt.suspect, attempt.found or str(first), attempt.helped))
        raise first

    def _attempts(self, model: Model, bench: Bench) -> Iterator[_Try]:
        if spoiled := self.check(model):
            yield _Try("memory", bench, "read again", f"bytes in memory had changed: {shortened(spoiled)}")
        self._drop(model)
        yield _Try("loading", bench, "read again from its file")
        if bench.device.asynchronous:
            with self._synchronous(bench):
                self._drop(model)
                yield _Try("memory", bench, "copied without asynchronous copies")
        if bench.run.attention != REFERENCE:
            with_reference = replace(bench, run=replace(bench.run, attention=REFERENCE, attention_slice_size="auto"))
            yield _Try("attention", with_reference, f"computed with attention_type: {REFERENCE}")

    def check(self, model: Model | None = None) -> list[str]:
        """Sum what is in memory again, of one model or of all; what was wrong, by name; it is read again."""
        known = None if model is None else _digests(model)
        wrong = [label for tier in self._tiers for label in tier.check(known)]
        if wrong:
            self._conditionings.clear()
        return wrong

    def reload(self, model: Model) -> None:
        """Prove a model's bytes in memory again, count what was wrong, and have all of it read anew."""
        if spoiled := self.check(model):
            self._count(Repair("memory", f"bytes in memory had changed: {shortened(spoiled)}", "read again"))
        self._drop(model)

    def _drop(self, model: Model) -> None:
        for tier in self._tiers:
            for digest in _digests(model):
                tier.drop(digest)
        machine.give_back()

    @contextmanager
    def _synchronous(self, bench: Bench) -> Generator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, bench.device, "asynchronous", bench.device.asynchronous)
            bench.device.asynchronous = False
            yield

    def _repaired(self, image: Image, repair: Repair) -> Image:
        self._count(repair)
        metadata = {**image.metadata, "repairs": [*image.metadata["repairs"], asdict(repair)]}
        return replace(
            image, metadata=metadata, warnings=(*image.warnings, f"repaired: {repair.wrong}; {repair.helped}")
        )

    def _count(self, repair: Repair) -> None:
        before = kept.read(self._path, repair.helped).get("times", 0)
        values = {"times": before + 1, "suspect": repair.suspect, "last": repair.wrong}
        kept.keep(self._path, repair.helped, values)


def _digests(model: Model) -> list[str]:
    """Of all that is in memory for a model: its components, and what lies over them."""
    return [digest for component in model.manifest.components for digest in digests(component)]
