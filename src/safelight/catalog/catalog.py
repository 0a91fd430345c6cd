"""What a user has: models, adapters, input images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safelight.catalog.adapters import Adapters
from safelight.catalog.inputs import Inputs
from safelight.catalog.library import Library


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the contents that a request names are found."""

    library: Library
    adapters: Adapters
    inputs: Inputs

    @classmethod
    def under(cls, root: Path) -> Catalog:
        return cls(Library(root), Adapters(root), Inputs(root))
