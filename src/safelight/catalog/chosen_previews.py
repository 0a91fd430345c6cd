"""The files of previews that users chose, by the name of their model or adapter. No Pillow."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from safelight import names

FOLDER = "previews"

Kind = Literal["model", "adapter"]


def place(root: Path, kind: Kind, name: str) -> Path:
    """Return the path of a chosen preview, whether it exists or not."""
    return root / FOLDER / f"{kind}-{names.file_stem(names.canonical(name))}.webp"


def rename(root: Path, kind: Kind, before: str, new: str) -> None:
    """Give the chosen preview of a renamed model or adapter its new name."""
    with contextlib.suppress(FileNotFoundError):
        place(root, kind, before).replace(place(root, kind, new))


def forget(root: Path, kind: Kind, name: str) -> None:
    """Remove the chosen preview of a removed model or adapter: another one may get its name."""
    place(root, kind, name).unlink(missing_ok=True)
