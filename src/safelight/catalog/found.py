"""Finds what can be added in a folder: files that may be models or adapters, and diffusers folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safelight.files.folder import find_index


@dataclass(frozen=True, slots=True)
class Found:
    """A file or diffusers folder. ``within``: the user named a folder around it, not this path itself."""

    endings: ClassVar[tuple[str, ...]] = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")

    path: Path
    within: bool


def found_in(path: Path) -> Iterator[Found]:
    """Yield the path itself or, for a folder, the files in it and in its subfolders, sorted by name in each folder.

    A diffusers folder counts as one file. Links to folders are followed, but no folder is read twice. A folder that
    may not be read has nothing.
    """
    path = path.expanduser()
    if not path.is_dir() or _is_diffusers(path):
        yield Found(path, within=False)
        return
    seen: set[str] = set()
    for folder, inner, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        diffusers = [name for name in inner if _is_diffusers(Path(folder) / name)]
        inner[:] = [name for name in inner if name not in diffusers and not name.startswith(".")]
        names = [name for name in files if name.lower().endswith(Found.endings) and not name.startswith(".")]
        for name in sorted([*diffusers, *names]):
            yield Found(Path(folder) / name, within=True)


def _is_diffusers(folder: Path) -> bool:
    try:
        return find_index(folder) is not None
    except OSError:
        return False
