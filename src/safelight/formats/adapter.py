"""A file that changes a checkpoint's weights, as a component of its own: its tensors, and what its metadata says."""

from __future__ import annotations

import json
from typing import Any, cast

from safelight.errors import UnsupportedModelError
from safelight.formats.header import Header
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.layout import FLOATS, ComponentLayout, TensorPlace, vae_alone

VAE = "vae"

KINDS = frozenset({"lora", "loha", "lokr", "full_difference", VAE})
"""Kinds of files that change a checkpoint: adapters of weights, and VAEs that take the place of its own."""

ROLE = "adapter"

METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's settings."""


VAE_PREFIX = "first_stage_model."


def layout(header: Header, kind: str) -> ComponentLayout:
    """The adapter's tensors under their own names; a VAE's under the module's. Raises UnsupportedModelError for what
    cannot be read exactly, IncompleteModelError for a VAE that lacks tensors."""
    if kind == VAE:
        return vae_alone(header.path, {name.removeprefix(VAE_PREFIX): i for name, i in header.tensors.items()})
    places: list[TensorPlace] = []
    for info in header.tensors.values():
        if info.dtype not in FLOATS:
            raise UnsupportedModelError(
                header.path, f"tensor {info.name} is {info.dtype}; only F32, F16 and BF16 are read"
            )
        places.append(TensorPlace(info.name, info.dtype, info.shape, info.path, info.offset, info.nbytes))
    scales = _scales(header)
    return ComponentLayout(ROLE, AdapterConfig(kind, tuple(scales), tuple(scales.values())), tuple(places))


def _scales(header: Header) -> dict[str, float]:
    """Component to scale, from PEFT's settings in the metadata."""
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        settings = cast("dict[str, Any]", json.loads(text))
        patterns = [key for key, value in settings.items() if key.endswith(("_pattern", "use_dora")) and value]
        # Settings without a component's name are those of bare modules: a UNet's.
        roles = {key.rpartition(".")[0] for key in settings if key == "r" or key.endswith(".r")}
        scales = {role or "unet": _scale(settings, f"{role}." if role else "") for role in sorted(roles)}
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(header.path, f"its {METADATA} is not PEFT's settings ({error})") from error
    odd = [key for key in patterns if not key.endswith("use_dora")]
    if odd:
        raise UnsupportedModelError(header.path, f"its {METADATA} has {odd[0]}, which is not read yet")
    return scales


def _scale(settings: dict[str, Any], prefix: str) -> float:
    rank, alpha = int(settings[f"{prefix}r"]), float(settings[f"{prefix}lora_alpha"])
    return alpha / rank**0.5 if settings.get(f"{prefix}use_rslora") else alpha / rank
