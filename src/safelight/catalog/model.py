"""The models and adapters of the library, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safelight.errors import RequestError
from safelight.families.family import Family
from safelight.families.registry import family
from safelight.request.model_defaults import ModelDefaults
from safelight.weights.manifest import ComponentManifest, Manifest

Origin = Literal["added", "starter", "path"]
"""``added``: by the user. ``starter``: part of Safelight. ``path``: used by its path, and in no library."""


@dataclass(frozen=True, slots=True)
class Model:
    """A complete checkpoint.

    ``path``: the file or folder that the user gave. The bytes may be elsewhere: the manifest has their paths.
    ``variant``: what the checkpoint was trained for: ``text-to-image``, ``inpainting`` and so on.
    ``resolution``: pixels per side at which the model makes its best images.
    ``rule``: the sentences of the rules that identified it.
    ``prediction_type_from_user``, ``variant_from_user``: the user set it.
    ``sources``: for each component that is in another file, the adapter or model from which it was taken, by role.
    ``defaults``: what a request gets for fields that it does not name, in place of the family's.
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
    prediction_type_from_user: bool
    manifest: Manifest
    variant_from_user: bool = False
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    defaults: ModelDefaults = field(default_factory=dict[str, Any])

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def family(self) -> Family:
        """The family that ``base`` names. Raises RequestError if no installed package has it."""
        try:
            return family(self.base)
        except KeyError as error:
            problem = f"is of the family {self.base}, which no installed package has"
            raise RequestError("model", self.name, problem) from error

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its components, in the order of use. ControlNets of a request are not among them."""
        return self.family.roles_of(self.variant)

    @property
    def has_distilled_guidance(self) -> bool:
        """Whether its denoiser reads the scale of distilled guidance."""
        return self.family.defaults_of(self.variant).guidance is not None

    def summary(self) -> dict[str, Any]:
        """Return the values that ``--json`` prints of a model."""
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
            "sources": dict(self.sources),
            "defaults": dict(self.defaults),
            "bytes": sum(t.stored_nbytes for c in self.manifest.components for t in c.tensors),
        }


@dataclass(frozen=True, slots=True)
class Adapter:
    """A file of its own beside checkpoints: a LoRA or relative, a VAE, a ControlNet, or a textual inversion.

    ``base``: the base of the checkpoints that it fits, from its names and shapes; "" if unknown.
    ``base_from_user``: the user set the base.
    ``trigger_words``: the words of a prompt that call a LoRA, as its metadata or a file beside it says them.
    """

    name: str
    path: Path
    kind: str
    base: str
    dtype: str
    format: str
    origin: Origin
    rule: str
    manifest: Manifest
    base_from_user: bool = False
    trigger_words: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def component(self) -> ComponentManifest:
        """Its component. A text encoder's file may also have others, such as a vision encoder."""
        return self.manifest.components[0]

    def summary(self) -> dict[str, Any]:
        """Return the values that ``--json`` prints of an adapter."""
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
            "bytes": sum(tensor.stored_nbytes for tensor in self.component.tensors),
            "trigger_words": list(self.trigger_words),
        }
