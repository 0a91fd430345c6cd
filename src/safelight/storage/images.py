"""Image files: written whole or not at all, and never over another."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safelight.files import settle, written
from safelight.metadata import chunks
from safelight.types import Image


def save(image: Image, folder: Path) -> Path:
    """Write the image as ``MODEL-SEED.png`` (or ``MODEL-SEED-2.png``, …) into ``folder``; returns the path.

    Raises UnreadableFileError when the folder cannot be written.
    """
    stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", image.model) + f"-{image.seed}"
    data = chunks.png(image)
    with written(folder) as (file, temporary):
        file.write(data)
        settle(file, temporary)
        return _place(temporary, folder, stem)


def _place(temporary: Path, folder: Path, stem: str) -> Path:
    """Give the finished file the first free name. A link does it without a race; some file systems have none."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            os.link(temporary, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:
            if not path.exists():
                return temporary.rename(path)
            number += 1
