"""A file that changes a checkpoint's weights, as a component of its own: its tensors, and what its metadata says."""

from __future__ import annotations

import json
from typing import Any, cast

from safelight.errors import UnsupportedModelError
from safelight.formats.header import Header, TensorInfo
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.layout import CONTROLNET, FLOATS, ComponentLayout, TensorPlace, alone

VAE = "vae"

INVERSION = "textual_inversion"

WEIGHTS = frozenset({"lora", "loha", "lokr", "full_difference"})
"""Kinds of files that change a checkpoint's weights: what a request asks for as ``loras``."""

KINDS = WEIGHTS | {VAE, CONTROLNET, INVERSION}
"""Those, VAEs that take the place of a checkpoint's own, ControlNets beside its UNet, and words for its text encoders.
"""

ROLE = "adapter"

METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's settings."""


PREFIXES = {VAE: "first_stage_model.", CONTROLNET: "control_model."}
"""With which such a file may name its tensors."""

_NUMBERED = "string_to_token."
"""AUTOMATIC1111's embeddings say which token they stood for in training."""

NUMBERS = FLOATS | {"F64", "I64", "I32", "I16", "I8", "U8"}
"""Dtypes of alpha, a single number: trainers write it in any of them."""


def read_tensors(header: Header, kind: str) -> list[TensorInfo]:
    """The tensors of an adapter's file that mean something. Raises UnsupportedModelError for other dtypes."""
    if kind in PREFIXES:
        return list(header.tensors.values())
    found = [i for i in header.tensors.values() if not (kind == INVERSION and i.name.startswith(_NUMBERED))]
    for info in found:
        allowed = NUMBERS if info.elements == 1 and info.name.endswith("alpha") else FLOATS | {"F64"}
        if info.dtype not in allowed:
            listed = ", ".join(sorted(allowed))
            raise UnsupportedModelError(header.path, f"tensor {info.name} is {info.dtype}; only {listed} are read")
    return found


def layout(header: Header, kind: str) -> ComponentLayout:
    """The adapter's tensors under their own names; a VAE's and a ControlNet's under the module's. Raises
    UnsupportedModelError for what cannot be read exactly, IncompleteModelError for a module that lacks tensors."""
    infos = read_tensors(header, kind)
    if kind in PREFIXES:
        return alone(header.path, kind, {info.name.removeprefix(PREFIXES[kind]): info for info in infos})
    places = tuple(TensorPlace(i.name, i.dtype, i.shape, i.path, i.offset, i.nbytes, source=i.name) for i in infos)
    scales = _scales(header)
    return ComponentLayout(ROLE, AdapterConfig(kind, tuple(scales), tuple(scales.values())), places)


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
