"""What is in a folder that could be added: files that may be models or adapters, and diffusers folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Found:
    """``within``: it was found in a folder that was given, and not given itself."""

    endings: ClassVar[tuple[str, ...]] = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

    path: Path
    within: bool


def found_in(path: Path) -> Iterator[Found]:
    """The path itself, or what is in that folder and below, by name. Links to folders are not followed, so that no
    folder is looked at twice; of a diffusers folder only the whole is given."""
    path = path.expanduser()
    if not path.is_dir() or (path / "model_index.json").exists():
        yield Found(path, within=False)
        return
    for folder, inner, files in os.walk(path):
        inner.sort()
        wholes = [name for name in inner if (Path(folder) / name / "model_index.json").exists()]
        inner[:] = [name for name in inner if name not in wholes and not name.startswith(".")]
        names = [name for name in files if name.lower().endswith(Found.endings) and not name.startswith(".")]
        for name in sorted([*wholes, *names]):
            yield Found(Path(folder) / name, within=True)
