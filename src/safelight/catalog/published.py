"""Models of published sizes that are not on this machine: their tensors by name and shape, without a file."""

from __future__ import annotations

import math
from pathlib import Path

from safelight.catalog.model import Model
from safelight.errors import InputError
from safelight.families.components import Config
from safelight.families.family import Family
from safelight.families.registry import families
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest, Manifest, ManifestTensor

_DTYPE, _ITEM_BYTES = "BF16", 2
"""The dtype in which these models are published."""


def sizes() -> dict[str, tuple[Family, dict[str, Config]]]:
    """Return each published size by its name, with its family and the settings of its components by role."""
    return {
        name: (family, configs) for family in families().values() for name, configs in family.published_sizes().items()
    }


def describe_published(name: str) -> Model:
    """Return a model of a published size. It has no files, and its digests are of names and shapes alone.

    Raises InputError for a size that no family declares.
    """
    known = sizes()
    if name not in known:
        raise InputError(f"--family {name!r}: must be one of {', '.join(known)}")
    family, configs = known[name]
    components = tuple(_component(role, config) for role, config in configs.items())
    return Model(
        name=name,
        path=Path(),
        kind="checkpoint",
        base=family.name,
        variant=next(iter(family.variants)),
        prediction_type="",
        zero_terminal_snr=False,
        dtype=_DTYPE,
        format="none",
        resolution=family.resolution,
        origin="path",
        rule="",
        prediction_type_from_user=False,
        manifest=Manifest(components, (), hash_texts(*(component.digest for component in components))),
    )


def _component(role: str, config: Config) -> ComponentManifest:
    tensors = tuple(
        ManifestTensor(row.name, _DTYPE, row.shape, Path(), 0, math.prod(row.shape) * _ITEM_BYTES, False, "")
        for row in config.rows()
    )
    return ComponentManifest(role, config, tensors, hash_texts(*(f"{one.name} {one.shape}" for one in tensors)))
