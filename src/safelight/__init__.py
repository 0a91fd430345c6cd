"""Safelight makes images with Stable Diffusion checkpoints; switching between them never spoils an image.

>>> import safelight
>>> engine = safelight.open_engine()
>>> for model in ("starter-noto", "starter-twemoji", "starter-noto"):
...     image = next(engine.generate(safelight.Request("red apple", model)))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import (
    AbsentTensorError,
    BindingError,
    Cancelled,
    CorruptFileError,
    FileError,
    IncompleteModelError,
    InputError,
    IntegrityError,
    ModelNotFoundError,
    OutOfMemoryError,
    RequestError,
    SafelightError,
    UnsafeFileError,
)
from safelight.request.results import Image, Progress
from safelight.request.run_settings import RunSettings
from safelight.request.schema import Request

if TYPE_CHECKING:
    from typing import Literal

    from safelight.workers.local_engine import LocalEngine

__all__ = [
    "AbsentTensorError",
    "BindingError",
    "Cancelled",
    "CorruptFileError",
    "FileError",
    "Image",
    "IncompleteModelError",
    "InputError",
    "IntegrityError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Progress",
    "Request",
    "RequestError",
    "RunSettings",
    "SafelightError",
    "UnsafeFileError",
    "open_engine",
    "save",
]


def open_engine(root: Path | str | None = None, **settings: Any) -> LocalEngine:
    """An engine in this process, with the library under ``root`` (or ``SAFELIGHT_ROOT``, or the platform's place).

    ``settings``: those of ``safelight.yaml``, above all others. Imports torch, which takes a second or two.

    The process is left as it was: environment, log levels, random numbers, torch's numeric settings. While an image is
    computed, though, those settings and the global random generators are the image's, for every thread: a program that
    computes in other threads meanwhile makes its images through a server (``safelight serve``), whose worker is a
    process of its own.
    """
    from safelight.assembly.importing import open_engine as wired
    from safelight.settings_sources import load_settings

    return wired(load_settings(Path(root) if root is not None else None, **settings), own_process=False)


def save(
    image: Image, folder: Path | str, image_format: Literal["png", "jpeg", "webp"] = "png", quality: int = 100
) -> Path:
    """Write an image with its metadata as a new file in ``folder``, completely or not at all. Returns the path.

    ``quality``: 1 to 100, for JPEG and WebP. A WebP file of quality 100 is lossless.
    If a file has the name already, the new one gets a number.
    """
    from safelight.queue import image_files as images

    return images.save(image, Path(folder), images.FileForm(image_format, quality))
