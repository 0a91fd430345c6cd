"""Finds what can be added in a folder: files that may be models or adapters, and diffusers folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Found:
    """A file or diffusers folder. ``within``: the user named a folder around it, not this path itself."""

    endings: ClassVar[tuple[str, ...]] = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

    path: Path
    within: bool


def found_in(path: Path) -> Iterator[Found]:
    """Yield the path itself or, for a folder, the files in it and in its subfolders, sorted by name in each folder.

    A diffusers folder counts as one file. Links to folders are not followed, so that no folder is read twice.
    """
    path = path.expanduser()
    if not path.is_dir() or (path / "model_index.json").exists():
        yield Found(path, within=False)
        return
    for folder, inner, files in os.walk(path):
        inner.sort()
        diffusers = [name for name in inner if (Path(folder) / name / "model_index.json").exists()]
        inner[:] = [name for name in inner if name not in diffusers and not name.startswith(".")]
        names = [name for name in files if name.lower().endswith(Found.endings) and not name.startswith(".")]
        for name in sorted([*diffusers, *names]):
            yield Found(Path(folder) / name, within=True)


def split_components(found: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Split what a folder has into checkpoints and components of them: text encoders and VAEs.

    What cannot be read counts as a checkpoint: adding it says why. So does a path that the user named.
    """
    from safelight.catalog.identify import identify
    from safelight.errors import InputError
    from safelight.weights.adapter_file import TEXT_ENCODER, VAE

    checkpoints: list[Found] = []
    components: list[Found] = []
    for one in found:
        kind = ""
        if one.within and one.path.is_file():
            try:
                kind = identify(one.path).kind
            except InputError:
                kind = ""
        (components if kind in (TEXT_ENCODER, VAE) else checkpoints).append(one)
    return checkpoints, components


def asks_variant(path: Path) -> bool:
    """Return whether nothing in a file says which variant it is. Raises InputError."""
    from safelight.catalog.identify import identify

    found = identify(path)
    return found.layout is not None and found.variant is None
