"""Cards: the summary of a model or adapter that listings show (``safelight models list``, the page), without its
tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight import names
from safelight.catalog.model import Adapter, Model


@dataclass(frozen=True, slots=True)
class Card:
    """A model or adapter without its tensors.

    ``record_path``: the file of its record; for a starter, the path of the model or adapter itself.
    ``summary``: the values that ``--json`` prints.
    ``files``: (path, size in bytes, modification time in nanoseconds) of its files, to notice changes.
    ``components``: (role, digest) of each component.
    ``vectors``: shapes of a textual inversion's tensors, by name; None for all other kinds.
    ``problem``: why the record cannot be read; "" if it can.
    """

    name: str
    record_path: Path
    summary: Mapping[str, Any]
    files: tuple[tuple[str, int, int], ...] = ()
    components: tuple[tuple[str, str], ...] = ()
    vectors: Mapping[str, tuple[int, ...]] | None = None
    problem: str = ""

    @property
    def path(self) -> Path:
        return Path(self.summary["path"])

    @property
    def stem(self) -> str:
        """The name of its file without the suffix. Prompts of other programs use it."""
        folder = str(self.summary["format"]).startswith("diffusers")
        return names.canonical(self.path.name if folder else self.path.stem)

    @property
    def kind(self) -> str:
        return self.summary["kind"]

    @property
    def digest(self) -> str:
        return self.summary["digest"]

    def state(self) -> str:
        """Return ``there``, ``changed`` or ``gone``, from the present sizes and times of its files."""
        for path, size, mtime_ns in self.files:
            try:
                status = os.stat(path)
            except OSError:
                return "gone"
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                return "changed"
        return "there"


def card(record: Path, found: Model | Adapter) -> Card:
    """Return the card of a record."""
    stamps = tuple((str(stamp.path), stamp.size, stamp.mtime_ns) for stamp in found.manifest.files)
    vectors = None
    if isinstance(found, Adapter) and found.kind == "textual_inversion":
        vectors = {tensor.name: tensor.shape for tensor in found.component.tensors}
    components = tuple((component.role, component.digest) for component in found.manifest.components)
    return Card(found.name, record, found.summary(), stamps, components, vectors)
