"""The files of canaries, one for each model. No torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from safelight.devices import measurements


@dataclass(frozen=True, slots=True)
class Canary:
    """A stored canary.

    ``pixels_sha256``: SHA-256 of its pixels (hex).
    ``run``: its run settings.
    ``png``: the image as a PNG in base64, to measure differences.
    ``made``: when it was made, in seconds since 1970.
    """

    pixels_sha256: str
    run: Mapping[str, Any]
    png: str
    made: float

    def pixels(self) -> np.ndarray[Any, Any]:
        """Return the pixels, uint8 (h, w, 3)."""
        with PILImage.open(io.BytesIO(base64.b64decode(self.png))) as image:
            return np.asarray(image.convert("RGB"))


def canaries_path(root: Path, digest: str) -> Path:
    """Return the file of a model's canaries. ``digest``: of the model."""
    return root / "canaries" / f"{digest[:32]}.json"


def read_canaries(root: Path, digest: str) -> list[Canary]:
    """Return all canaries of a model, of any run settings and versions, the newest last."""
    found = [Canary(**value) for value in measurements.read(canaries_path(root, digest), "canaries").values()]
    return sorted(found, key=lambda canary: canary.made)
