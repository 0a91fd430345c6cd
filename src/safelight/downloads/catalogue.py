"""The catalogue: well-known models, and bundles of files that together make a usable one.

``catalogue.json`` has them. Each row names the published page that says where the file is (``cite``). What no published
source says is null there, and is learnt from the server at the first download.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any, TypeVar

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """A file, or a whole repository.

    ``kind``: ``checkpoint``, ``denoiser``, ``text_encoder``, ``vae``, ``lora``, ``controlnet``, ``textual_inversion``.
    ``family``: see :class:`safelight.families.family.Family`.
    ``variant``: that of a model whose file does not say it; "" for others.
    ``source``: a repository on Hugging Face, or an https address.
    ``file``: its path in the repository; "" for the whole repository.
    ``form``: of its weights; "" if no source says it.
    ``bytes``, ``sha256``: None if no source says them. ``gigabytes``: about.
    ``license``: None if it is unknown. ``gated``: its authors ask for consent.
    ``todo``: what the user must do or may not do; "" for nothing.
    ``cite``: the page that says all this.
    """

    name: str
    title: str
    kind: str
    family: str
    variant: str
    source: str
    file: str
    form: str
    bytes: int | None
    gigabytes: float | None
    sha256: str | None
    license: str | None
    gated: bool
    todo: str
    cite: str


@dataclass(frozen=True, slots=True)
class CatalogueBundle:
    """Files that together make a usable model.

    ``memory_gb``: an estimate of the memory in which it works well, from the sizes of the files.
    ``files``: their names.
    """

    name: str
    title: str
    family: str
    memory_gb: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All rows, by name."""

    files: dict[str, CatalogueFile]
    bundles: dict[str, CatalogueBundle]

    def find(self, name: str) -> list[CatalogueFile]:
        """Return the files of a bundle, the file of a name, or an empty list."""
        bundle = self.bundles.get(name)
        if bundle is not None:
            return [self.files[one] for one in bundle.files]
        return [self.files[name]] if name in self.files else []

    def bundles_for(self, family: str = "", memory_gb: float | None = None) -> list[CatalogueBundle]:
        """Return the bundles of a family ("" for all) for at most this memory, by family and memory."""
        found = (
            one
            for one in self.bundles.values()
            if family in ("", one.family) and (memory_gb is None or one.memory_gb <= memory_gb)
        )
        return sorted(found, key=lambda one: (one.family, one.memory_gb, one.name))


@lru_cache
def read_catalogue() -> Catalogue:
    """Return the catalogue of this version of Safelight."""
    written: Any = json.loads((resources.files("safelight.downloads") / "catalogue.json").read_text("utf-8"))
    files = [_row(CatalogueFile, row) for row in written["files"]]
    bundles = [_row(CatalogueBundle, row | {"files": tuple(row["files"])}) for row in written["bundles"]]
    return Catalogue({one.name: one for one in files}, {one.name: one for one in bundles})


def _row(kind: type[_Row], values: dict[str, Any]) -> _Row:
    """Return a row. Raises KeyError, TypeError if the file lacks a column or has an unknown one."""
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != names:
        raise KeyError(f"{values.get('name')}: {values.keys() ^ names}")
    return kind(**values)
