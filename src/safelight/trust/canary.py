"""Canaries: a tiny generation by each model whose result is known, from a process that has held no other model.

It is kept with the run settings and versions that made it, so that it can be compared after a switch, by the doctor,
and after an upgrade. 264 by 264 pixels are 1,089 latents: more than the 1,024 beyond which kernels are known to break.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from safelight.devices import kept
from safelight.engine.repair import Repairs
from safelight.errors import CanaryError
from safelight.generate import run
from safelight.generate.bench import Bench, computing_all
from safelight.library.chosen import Settled
from safelight.library.model import Model
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.trust.difference import Difference, difference

SIDE = 264
STEPS = 2
PROMPT = "a red apple on a white table, photograph"
SEED = 20_240_229


@dataclass(frozen=True, slots=True)
class Canary:
    """``run``: the run settings that made it; ``png``: the image, for saying how far another is from it; ``made``:
    seconds since 1970."""

    pixels_sha256: str
    run: Mapping[str, Any]
    png: str
    made: float

    def pixels(self) -> np.ndarray[Any, Any]:
        """uint8 (h, w, 3)."""
        with PILImage.open(io.BytesIO(base64.b64decode(self.png))) as image:
            return np.asarray(image.convert("RGB"))


def request(model: Model, precision: str = "auto") -> Request:
    """What a model's canary is asked for."""
    wanted: Any = precision
    return Request(PROMPT, model.name, seed=SEED, steps=STEPS, width=SIDE, height=SIDE, precision=wanted)


class Canaries:
    """The canaries kept under ``root``; ``fresh`` makes an image of a request, with that digest, in a new process."""

    def __init__(self, root: Path, fresh: Callable[[Request, str], Image]) -> None:
        self._folder = root / "canaries"
        self._fresh = fresh

    def known(self, model: Model, settings: Mapping[str, Any]) -> Canary | None:
        """The canary of a model with those run settings."""
        return next((canary for canary in self.history(model) if dict(canary.run) == dict(settings)), None)

    def history(self, model: Model) -> list[Canary]:
        """All canaries of a model, with whatever run settings and versions; the newest last."""
        values = kept.read(self._path(model), "canaries")
        found = [Canary(**value) for value in values.values()]
        return sorted(found, key=lambda canary: canary.made)

    def keep(self, model: Model, image: Image) -> Canary:
        """Keep an image as the canary of its run settings."""
        held = io.BytesIO()
        PILImage.frombytes("RGB", (image.width, image.height), image.pixels).save(held, "PNG")
        png = base64.b64encode(held.getvalue()).decode()
        canary = Canary(image.pixels_sha256, image.metadata["run"], png, time.time())
        others = kept.read(self._path(model), "canaries")
        key = f"{canary.made:.3f} {canary.pixels_sha256[:16]}"
        values = {"pixels_sha256": canary.pixels_sha256, "run": dict(canary.run), "png": png, "made": canary.made}
        kept.keep(self._path(model), "canaries", {**others, key: values})
        return canary

    def made_fresh(self, model: Model, precision: str = "auto") -> Canary:
        """Make the canary in a new process, and keep it."""
        return self.keep(model, self._fresh(request(model, precision), model.digest))

    def compare(self, model: Model, make: Callable[[Request], Image], precision: str = "auto") -> Difference | None:
        """Make the canary here and compare it with the known one, which is made in a new process when there is none:
        how far they are from each other, None when they are the same."""
        image = make(request(model, precision))
        known = self.known(model, image.metadata["run"]) or self.made_fresh(model, precision)
        if known.pixels_sha256 == image.pixels_sha256:
            return None
        return difference(known.pixels(), pixels_of(image))

    def _path(self, model: Model) -> Path:
        return self._folder / f"{model.digest[:32]}.json"


def after_switch(canaries: Canaries, repairs: Repairs) -> Callable[[Model, Bench], None]:
    """For :attr:`safelight.engine.local.LocalEngine.on_switch`: compares the canary of the model that was switched to;
    when it is another, what is in memory is proven again and read anew, and both are compared once more. Raises
    CanaryError when it is still another."""

    def look(model: Model, bench: Bench) -> None:
        def make(asked: Request) -> Image:
            return run.image(Settled(asked), model, computing_all(bench), 0, lambda _: None)

        if canaries.compare(model, make, bench.run.dtype) is None:
            return
        repairs.reload(model)
        apart = canaries.compare(model, make, bench.run.dtype)
        if apart is not None:
            raise CanaryError(model.name, str(apart))

    return look


def pixels_of(image: Image) -> np.ndarray[Any, Any]:
    """uint8 (h, w, 3)."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
