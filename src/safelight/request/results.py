"""What is reported while images are made, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where an image's time went, in seconds. ``switch``: making the model's weights resident and binding them.
    ``gates``: time of the gates; it is already included in the other stages."""

    switch: float
    encode: float
    denoise: float
    decode: float
    gates: float = 0.0

    @property
    def total(self) -> float:
        return self.switch + self.encode + self.denoise + self.decode


@dataclass(frozen=True, slots=True)
class Repair:
    """What was wrong while an image was made, and what helped.

    ``suspect``: the class of the cause (see the glossary).
    """

    suspect: Literal["loading", "state", "attention", "memory", "numbers"]
    wrong: str
    helped: str


Stage = Literal["switch", "encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Preview:
    """What an unfinished image looks like: raw RGB bytes, row by row, a pixel for each latent."""

    pixels: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A report of a generation's progress.

    ``image``: the number of the image, counted from 0.
    ``step``, ``steps``: the number of steps done, and of all steps, in the stage.
    ``memory``: the report of :meth:`LocalEngine.memory`, at the beginning and end of each stage, but not twice within a
        fifth of a second; None at other times.
    ``preview``: a picture of the unfinished image, after a step; None at other times.
    """

    stage: Stage
    image: int
    step: int
    steps: int
    memory: Mapping[str, Any] | None = None
    preview: Preview | None = None


OnProgress = Callable[[Progress], None]
"""Called in the thread that computes; may raise :class:`safelight.Cancelled` to stop the job."""


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image. ``pixels``: raw RGB bytes, row by row. ``metadata``: what the file's ``safelight`` chunk holds.

    ``host_peak_bytes``: the largest resident set of the process so far. ``path``: where it was saved, None if nowhere.
    ``warnings``: what the user should know, such as a prompt that was cut.
    """

    pixels: bytes
    width: int
    height: int
    seed: int
    model: str
    model_digest: str
    pixels_sha256: str
    seconds: Seconds
    host_peak_bytes: int
    metadata: Mapping[str, Any]
    path: Path | None = None
    warnings: tuple[str, ...] = ()
