"""What a user has: models, adapters, input images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safelight.library.adapters import Adapters
from safelight.library.inputs import Inputs
from safelight.library.library import Library


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the contents that a request names are found."""

    library: Library
    adapters: Adapters
    inputs: Inputs

    @classmethod
    def under(cls, root: Path) -> Catalog:
        return cls(Library(root), Adapters(root), Inputs(root))
