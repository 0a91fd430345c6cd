"""Models of published sizes that are not on this machine: their tensors by name and shape, without a file."""

from __future__ import annotations

import math
from pathlib import Path

from safelight.catalog.model import Model
from safelight.errors import InputError
from safelight.families.components import Config
from safelight.families.family import Family
from safelight.families.registry import families
from safelight.files.blocks import BLOCKS
from safelight.files.header import ITEM_BYTES
from safelight.files.packing import PACKED
from safelight.weights.digest import hash_texts
from safelight.weights.manifest import ComponentManifest, Manifest, ManifestTensor

_DTYPE = "BF16"
"""The dtype in which these models are published."""

FORMS = {"bf16": _DTYPE, "fp8": "F8_E4M3", **{form.lower(): form for form in (*BLOCKS, *PACKED)}}
"""The forms that a quantised file of them may have."""

_BITS = {"INT8": 8, "MXFP8": 8.25, "NVFP4": 4.5, "NF4": 4.127, "FP4": 4.5}
"""Bits of a number with its scales: one for each 32 numbers in mxfp8, for each 16 in nvfp4, for each 64 in nf4 and fp4.
Those of nf4 have scales of their own, as most files have."""

SHORT = {"q4": "q4_k", "q5": "q5_k", "q6": "q6_k", "q8": "q8_0"}
"""Short names of the forms that most people fetch."""


def sizes() -> dict[str, tuple[Family, dict[str, Config]]]:
    """Return each published size by its name, with its family and the settings of its components by role."""
    return {
        name: (family, configs) for family in families().values() for name, configs in family.published_sizes().items()
    }


def describe_published(name: str, form: str = "bf16") -> Model:
    """Return a model of a published size. It has no files, and its digests are of names and shapes alone.

    ``form``: of its matrices, one of :data:`FORMS` or :data:`SHORT`. A VAE is never quantised.
    Raises InputError for a size that no family declares, and for an unknown form.
    """
    stored = FORMS.get(SHORT.get(form.lower(), form.lower()))
    if stored is None:
        raise InputError(f"--form {form!r}: must be one of {', '.join((*SHORT, *FORMS))}")
    known = sizes()
    if name not in known:
        raise InputError(f"--family {name!r}: must be one of {', '.join(known)}")
    family, configs = known[name]
    components = tuple(
        _component(role, config, _DTYPE if role == family.vae else stored) for role, config in configs.items()
    )
    return Model(
        name=name,
        path=Path(),
        kind="checkpoint",
        base=family.name,
        variant=next(iter(family.variants)),
        prediction_type="",
        zero_terminal_snr=False,
        dtype=stored,
        format="none",
        resolution=family.resolution,
        origin="path",
        rule="",
        prediction_type_from_user=False,
        manifest=Manifest(components, (), hash_texts(*(component.digest for component in components))),
    )


def _component(role: str, config: Config, form: str) -> ComponentManifest:
    tensors = tuple(_tensor(row.name, row.shape, form) for row in config.rows())
    return ComponentManifest(
        role, config, tensors, hash_texts(*(f"{one.name} {one.dtype} {one.shape}" for one in tensors))
    )


def _tensor(name: str, shape: tuple[int, ...], form: str) -> ManifestTensor:
    """Return a tensor. A vector, and a tensor that has no whole blocks, is not quantised."""
    count, block = math.prod(shape), BLOCKS.get(form)
    if len(shape) < 2 or (block is not None and count % block.elements):
        form, block = _DTYPE, None
    if block is not None:
        nbytes = count // block.elements * block.nbytes
    else:
        nbytes = round(count * _BITS[form] / 8) if form in _BITS else count * ITEM_BYTES[form]
    return ManifestTensor(name, form, shape, Path(), 0, nbytes, False, "")
