"""Canaries: a tiny image by each model, made in a process that held no other model.

A canary is stored with its run settings and versions. Safelight compares it after a switch, in the doctor, and after an
upgrade.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from safelight.catalog.model import Model
from safelight.devices import measurements
from safelight.diagnostics.canary_file import Canary, canaries_path, read_canaries
from safelight.diagnostics.image_difference import Difference, difference
from safelight.errors import CanaryError
from safelight.families.family import Family
from safelight.families.features import Feature
from safelight.families.registry import families
from safelight.pipeline import run
from safelight.pipeline.repair import ImageRepairer
from safelight.pipeline.resources import Resources, without_text_cache
from safelight.request.results import Image
from safelight.request.schema import Request
from safelight.resolve.contents import Contents

TOKENS_PER_SIDE = 33
"""Tokens of the denoiser in each direction. They are 1,089 together, more than the 1,024 above which some kernels are
known to break. A canary has 264 by 264 pixels for Stable Diffusion, and 528 by 528 where a token has 16 by 16."""

STEPS = 2
PROMPT = "a red apple on a white table, photograph"
SEED = 20_240_229


def has_canary(model: Model) -> bool:
    """Whether the model draws from text alone, as the request for a canary does."""
    if model.base not in families():
        return False
    variant = model.family.variants.get(model.variant)
    if variant is None or variant.extra_input_channels or (variant.references and variant.references.least):
        return False
    return Feature.TEXT_TO_IMAGE in model.family.features


def side_of(family: Family) -> int:
    """Return the width and height of a family's canaries, in pixels."""
    return TOKENS_PER_SIDE * family.latents.multiple


def request(model: Model, precision: str = "auto") -> Request:
    """Return the request for a model's canary."""
    wanted: Any = precision
    side = side_of(model.family)
    return Request(PROMPT, model.name, seed=SEED, steps=STEPS, width=side, height=side, precision=wanted)


class Canaries:
    """The canaries under ``root``. ``fresh``: makes an image in a new process, from a request and a model's digest."""

    def __init__(self, root: Path, fresh: Callable[[Request, str], Image]) -> None:
        self._root = root
        self._fresh = fresh

    def known(self, model: Model, settings: Mapping[str, Any]) -> Canary | None:
        """Return a model's canary with the given run settings, None if there is none."""
        return next((canary for canary in self.history(model) if dict(canary.run) == dict(settings)), None)

    def history(self, model: Model) -> list[Canary]:
        """Return all canaries of a model, of any run settings and versions, the newest last."""
        return read_canaries(self._root, model.digest)

    def keep(self, model: Model, image: Image) -> Canary:
        """Store an image as the canary of its run settings."""
        buffer = io.BytesIO()
        PILImage.frombytes("RGB", (image.width, image.height), image.pixels).save(buffer, "PNG")
        png = base64.b64encode(buffer.getvalue()).decode()
        canary = Canary(image.pixels_sha256, image.metadata["run"], png, time.time())
        others = measurements.read(self._path(model), "canaries")
        key = f"{canary.made:.3f} {canary.pixels_sha256[:16]}"
        values = {"pixels_sha256": canary.pixels_sha256, "run": dict(canary.run), "png": png, "made": canary.made}
        measurements.keep(self._path(model), "canaries", {**others, key: values})
        return canary

    def make_in_fresh_process(self, model: Model, precision: str = "auto") -> Canary:
        """Make a model's canary in a new process, and store it."""
        return self.keep(model, self._fresh(request(model, precision), model.digest))

    def compare(self, model: Model, make: Callable[[Request], Image], precision: str = "auto") -> Difference | None:
        """Make a model's canary with ``make``, and compare it with the stored one. Return None if they are equal.

        If there is no stored one, a new process makes it first.
        """
        image = make(request(model, precision))
        known = self.known(model, image.metadata["run"]) or self.make_in_fresh_process(model, precision)
        if known.pixels_sha256 == image.pixels_sha256:
            return None
        return difference(known.pixels(), pixels_of(image))

    def _path(self, model: Model) -> Path:
        return canaries_path(self._root, model.digest)


def after_switch(canaries: Canaries, image_repairer: ImageRepairer) -> Callable[[Model, Resources], None]:
    """Return a function for :attr:`safelight.workers.local_engine.LocalEngine.on_switch`.

    The function compares the new model's canary with the stored one. If it differs, the function checks the model's
    bytes in memory, loads the model again, and compares once more. It raises CanaryError if the canary still differs.
    Models that need an input image are skipped.
    """

    def look(model: Model, resources: Resources) -> None:
        def make(asked: Request) -> Image:
            return run.make_image(Contents.plain(asked, model), model, without_text_cache(resources), 0, lambda _: None)

        if not has_canary(model) or canaries.compare(model, make, resources.run_settings.dtype) is None:
            return
        image_repairer.verify_and_evict(model)
        apart = canaries.compare(model, make, resources.run_settings.dtype)
        if apart is not None:
            raise CanaryError(model.name, str(apart))

    return look


def pixels_of(image: Image) -> np.ndarray[Any, Any]:
    """Return an image's pixels, uint8 (h, w, 3)."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
