"""A model as the library knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safelight.weights.manifest import ComponentManifest, Manifest

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


@dataclass(frozen=True, slots=True)
class Adapter:
    """A file that changes a checkpoint's weights. ``base``: which one's, as names and shapes tell; "" unknown.
    ``told``: the base is the user's word."""

    name: str
    path: Path
    kind: str
    base: str
    dtype: str
    format: str
    origin: Origin
    rule: str
    manifest: Manifest
    told: bool = False

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def tensors(self) -> ComponentManifest:
        return self.manifest.components[0]

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints of an adapter."""
        return {
            "name": self.name,
            "kind": self.kind,
            "base": self.base,
            "dtype": self.dtype,
            "digest": self.digest,
            "path": str(self.path),
            "origin": self.origin,
            "rule": self.rule,
            "format": self.format,
            "bytes": sum(tensor.nbytes for tensor in self.tensors.tensors),
        }
