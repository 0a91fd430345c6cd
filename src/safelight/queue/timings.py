"""How long switches and images took on this machine, and how long others will take. No torch.

The time of an image is taken as proportional to its pixels, its steps and the calls of the denoiser in a step. So one
image of a model predicts all others of it. A model that has made no image is predicted from one of the same base, or
else from any other, in proportion to the bytes of the weights.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safelight.catalog.cards import Card
from safelight.devices import measurements
from safelight.request.results import Seconds
from safelight.request.schema import Request

KEY = "models"

CHANGE = 0.1
"""The share by which a timing must change before the file is written again."""

WRITE_SECONDS = 30.0
"""A model whose timing is in the file is written again after this time at the earliest."""

NEWEST_SHARE = 0.5
"""The weight of the newest image in the mean. What else this machine does changes, so the newest counts most."""

MIN_SWITCH_SECONDS = 1e-3
"""A shorter switch brought nothing: the weights were in memory."""

Basis = Literal["this model", "models of its base", "other models", ""]
"""What a prediction was derived from; empty if there is nothing to derive it from."""


@dataclass(frozen=True, slots=True)
class Known:
    """What predictions need to know of a model: its digest, base and variant, and the bytes of its weights."""

    digest: str
    base: str
    variant: str
    nbytes: int


def known(card: Card) -> Known:
    """Return what predictions need to know of a model."""
    summary = card.summary
    return Known(summary["digest"], summary["base"], summary["variant"], summary["bytes"])


@dataclass(frozen=True, slots=True)
class Timing:
    """What the images of a model took.

    ``denoise``: seconds for each megapixel, step and call of the denoiser.
    ``rest``: seconds for each megapixel in text encoders, VAE and checks.
    ``switch``: seconds of the last switch that had to bring its weights; None if there was none.
    """

    denoise: float
    rest: float
    switch: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a switch and of each image; None if nothing is known that they could be derived from.

    ``basis``: what ``image`` was derived from.
    """

    switch: float | None
    image: float | None
    basis: Basis


def denoiser_work(request: Request, pixels: int) -> float:
    """Return the work of the denoiser for an image, in megapixels times steps times calls in a step.

    ``request``: with the model's defaults filled in.
    ``pixels``: of the first pass.
    """
    calls = 1 if request.guidance_scale in (0.0, 1.0) else 2
    work = pixels * request.first_pass_steps
    if request.hires_scale > 1:
        steps = request.hires_steps or request.step_count
        work += pixels * request.hires_scale**2 * steps * request.hires_strength
    return max(1e-6, work * calls / 1e6)


def megapixels(request: Request, pixels: int) -> float:
    """Return the megapixels of all passes, which text encoders and VAE work for."""
    return pixels * (1 + (request.hires_scale**2 if request.hires_scale > 1 else 0)) / 1e6


class Timings:
    """The timings of a root, in a file of their own. Losing it only costs predictions. Thread-safe.

    ``path``: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._of = dict(_read(measurements.read(path, KEY)))
        self._in_file = dict(self._of)
        self._written: dict[str, float] = {}

    def add(self, digest: str, request: Request, pixels: int, seconds: Seconds) -> None:
        """Record an image. ``pixels``: of the first pass. ``request``: with the model's defaults filled in."""
        denoise = seconds.denoise / denoiser_work(request, pixels)
        rest = (seconds.encode + seconds.decode) / megapixels(request, pixels)
        with self._lock:
            before = self._of.get(digest)
            if before is not None:
                denoise = before.denoise + NEWEST_SHARE * (denoise - before.denoise)
                rest = before.rest + NEWEST_SHARE * (rest - before.rest)
            switch = None if before is None else before.switch
            if seconds.switch > MIN_SWITCH_SECONDS:
                switch = seconds.switch
            self._of[digest] = timing = Timing(denoise, rest, switch)
            now, in_file = time.monotonic(), self._in_file.get(digest)
            just_written = now - self._written.get(digest, -WRITE_SECONDS) < WRITE_SECONDS
            if in_file is not None and (just_written or not _differ(in_file, timing)):
                return
            self._written[digest], self._in_file = now, dict(self._of)
            all_of_them = {name: asdict(one) for name, one in self._of.items()}
        measurements.keep(self._path, KEY, all_of_them)

    def predict(
        self, model: Known, others: Iterable[Known], request: Request, pixels: int, resident: bool
    ) -> Prediction:
        """Predict the time of an image.

        ``others``: the models of the library.
        ``pixels``: of the first pass.
        ``resident``: whether the model is in memory.
        """
        known = self._known(others)
        denoise, rest, basis = self._rates(model, known)
        image = None
        if denoise is not None and rest is not None:
            image = denoise * denoiser_work(request, pixels) + rest * megapixels(request, pixels)
        return Prediction(0.0 if resident else self._switch(model, known), image, basis)

    def switch_seconds(self, models: Iterable[Known]) -> list[float | None]:
        """Predict, for each model, the seconds until all its weights are in memory; None if nothing is known."""
        models = list(models)
        known = self._known(models)
        return [self._switch(model, known) for model in models]

    def _known(self, models: Iterable[Known]) -> list[tuple[Known, Timing]]:
        return [(model, timing) for model in models if (timing := self._of.get(model.digest)) is not None]

    def _rates(self, model: Known, known: list[tuple[Known, Timing]]) -> tuple[float | None, float | None, Basis]:
        own = self._of.get(model.digest)
        if own is not None:
            return own.denoise, own.rest, "this model"
        same = [timing for other, timing in known if (other.base, other.variant) == (model.base, model.variant)]
        if not same:
            same = [timing for other, timing in known if other.base == model.base]
        if same:
            return _median([one.denoise for one in same]), _median([one.rest for one in same]), "models of its base"
        if not known:
            return None, None, ""
        per_byte = [timing.denoise / max(1, other.nbytes) for other, timing in known]
        return _median(per_byte) * model.nbytes, _median([timing.rest for _, timing in known]), "other models"

    def _switch(self, model: Known, known: list[tuple[Known, Timing]]) -> float | None:
        own = self._of.get(model.digest)
        if own is not None and own.switch is not None:
            return own.switch
        per_byte = [one.switch / max(1, other.nbytes) for other, one in known if one.switch is not None]
        return _median(per_byte) * model.nbytes if per_byte else None


def _differ(before: Timing, now: Timing) -> bool:
    pairs = ((before.denoise, now.denoise), (before.rest, now.rest), (before.switch or 0.0, now.switch or 0.0))
    return any(abs(old - new) > CHANGE * old for old, new in pairs)


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _read(values: Mapping[str, Any]) -> Iterator[tuple[str, Timing]]:
    """Yield the stored timings, without damaged ones: they are measured again."""
    for digest, value in values.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            switch = value.get("switch")
            timing = Timing(float(value["denoise"]), float(value["rest"]), None if switch is None else float(switch))
            yield digest, timing
