"""A model as the library knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safelight.weights.manifest import Manifest

Origin = Literal["added", "starter", "path"]
"""``added`` by the user; ``starter`` came with Safelight; ``path`` was named by its path and is in no library."""

NATIVE_SIZES = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sdxl-refiner": 1024}
"""Pixels a side at which a base was trained."""


@dataclass(frozen=True, slots=True)
class Model:
    """A complete checkpoint. ``path`` is what the user named; the manifest says where the bytes are.

    ``resolution``: pixels a side at which it makes its best images. ``rule``: the sentence that identified it.
    ``told``: the prediction type is the user's word.
    """

    name: str
    path: Path
    kind: str
    base: str
    variant: str
    prediction_type: str
    zero_terminal_snr: bool
    dtype: str
    format: str
    resolution: int
    origin: Origin
    rule: str
    told: bool
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints of a model."""
        return {
            "name": self.name,
            "kind": self.kind,
            "base": self.base,
            "variant": self.variant,
            "prediction_type": self.prediction_type,
            "dtype": self.dtype,
            "digest": self.digest,
            "path": str(self.path),
            "origin": self.origin,
            "rule": self.rule,
            "format": self.format,
            "resolution": self.resolution,
            "bytes": sum(t.nbytes for c in self.manifest.components for t in c.tensors),
        }
