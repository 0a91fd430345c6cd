"""Installs packages with extensions for the time of a test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1] / "data/extensions"
"""A folder for each example of ``docs/extending.md``, which stands for an installed package."""


Install = Callable[..., None]
"""Takes folders or names of examples."""


class Packages:
    """The installed packages of a test, also for processes that it starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._path, self._variable = list(sys.path), os.environ.get("PYTHONPATH", "")
        self._folders: list[str] = []

    def install(self, *packages: str | Path) -> None:
        """Install these packages and no other ones. Strings name examples."""
        for name, module in list(sys.modules.items()):
            if any(str(getattr(module, "__file__", None)).startswith(f"{folder}/") for folder in self._folders):
                del sys.modules[name]
        self._folders = [str(HOME / package) for package in packages]
        self._monkeypatch.setattr(sys, "path", [*self._folders, *self._path])
        self._monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*self._folders, self._variable]))
        importlib.invalidate_caches()
        forget()


def forget() -> None:
    """Forget what this process knows of installed packages."""
    # Not above: the process that hands out the tests computes nothing, and others wait until it has begun.
    from safelight.extensions import extensions
    from safelight.families import family_model, registry
    from safelight.resolve.adapters import match_cached

    for cached in (extensions, match_cached, registry.families, registry.architectures, family_model._model):
        cached.cache_clear()


def write_package(folder: Path, name: str, group: str, entries: Mapping[str, str]) -> None:
    """Write what makes a folder an installed package: its name, and its entry points in a group."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
