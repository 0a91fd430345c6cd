"""Reads an adapter file as a component: its tensors, and the settings in its metadata."""

from __future__ import annotations

import json
from typing import Any, cast

from safelight.errors import IncompleteModelError, UnsupportedModelError
from safelight.families.family import CONTROLNET
from safelight.families.registry import families
from safelight.files.header import Header, TensorInfo
from safelight.weights.adapter_kinds import WEIGHT_ADAPTER_KINDS
from safelight.weights.adapter_mapping import DEFAULT_PEFT_ROLE, AdapterConfig
from safelight.weights.layout import FLOATS, ComponentLayout, TensorLocation, single_file_layout

VAE = "vae"

TEXT_ENCODER = "text_encoder"

INVERSION = "textual_inversion"

NON_WEIGHT_KINDS = frozenset({VAE, TEXT_ENCODER, CONTROLNET, INVERSION})
"""Kinds that do not change weights: VAEs and text encoders, which a model uses as its own, ControlNets that work beside
its denoiser, and textual inversions, which add words for its text encoders."""


def is_adapter(kind: str) -> bool:
    """Return whether files of this kind are adapters."""
    return kind in NON_WEIGHT_KINDS or kind in WEIGHT_ADAPTER_KINDS


ROLE = "adapter"

METADATA = "lora_adapter_metadata"
"""The metadata key under which diffusers writes PEFT's settings."""


COMPONENT_KINDS = frozenset({VAE, TEXT_ENCODER, CONTROLNET})
"""Kinds of files that hold a whole component, under the names of its module."""

_TOKEN_PREFIX = "string_to_token."
"""AUTOMATIC1111's embeddings have a tensor of this name: the token that the embedding replaced in training."""

ALPHA_DTYPES = FLOATS | {"F64", "I64", "I32", "I16", "I8", "U8"}
"""Dtypes of alpha, which is a single number. Trainers use any of them."""


def tensors_to_read(header: Header, kind: str) -> list[TensorInfo]:
    """Return the tensors of an adapter file that Safelight reads: all but the token of AUTOMATIC1111's embeddings.

    Raises UnsupportedModelError for a dtype that is not supported.
    """
    if kind in COMPONENT_KINDS:
        return list(header.tensors.values())
    found = [i for i in header.tensors.values() if not (kind == INVERSION and i.name.startswith(_TOKEN_PREFIX))]
    for info in found:
        if info.packing is not None:
            raise UnsupportedModelError(header.path, f"tensor {info.name} has a scale, which is not read here")
        allowed = ALPHA_DTYPES if info.elements == 1 and info.name.endswith("alpha") else FLOATS | {"F64"}
        if info.dtype not in allowed:
            listed = ", ".join(sorted(allowed))
            raise UnsupportedModelError(header.path, f"tensor {info.name} is {info.dtype}; only {listed} are read")
    return found


def layout(header: Header, kind: str) -> tuple[ComponentLayout, ...]:
    """Return the layouts of the components in an adapter file: its own first, then those within it.

    The tensors of a VAE or a ControlNet get the module's names. All other adapters keep the names of the file.
    Raises UnsupportedModelError when a tensor has a dtype, or PEFT's settings have a value, that is not supported.
    Raises IncompleteModelError when tensors of the module are missing.
    """
    infos = tensors_to_read(header, kind)
    if kind in COMPONENT_KINDS:
        return _whole(header, kind, infos)
    locations = tuple(
        TensorLocation(i.name, i.dtype, i.shape, i.path, i.offset, i.nbytes, source=i.name) for i in infos
    )
    scales = _scales(header)
    return (ComponentLayout(ROLE, AdapterConfig(kind, tuple(scales), tuple(scales.values())), locations),)


def _whole(header: Header, kind: str, infos: list[TensorInfo]) -> tuple[ComponentLayout, ...]:
    """Return the layout by the first family that can read it.

    If none can, raises the error of the one whose pattern the tensors have.
    """
    failed: dict[bool, IncompleteModelError] = {}
    for family in families().values():
        for part in family.single_file_components:
            component = family.component_in(part)
            within = component is not None and component.within
            if part.kind == kind and not within and part.fits([info.name for info in infos]):
                try:
                    return single_file_layout(
                        header.path, part, family, {i.name.removeprefix(part.prefix): i for i in infos}
                    )
                except IncompleteModelError as error:
                    failed.setdefault(bool(part.pattern), error)
    if not failed:
        raise UnsupportedModelError(header.path, f"is a {kind} that no family has")
    raise failed[max(failed)]


def _scales(header: Header) -> dict[str, float]:
    """Return the scale of each component, from PEFT's settings in the metadata."""
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        settings = cast("dict[str, Any]", json.loads(text))
        patterns = [key for key, value in settings.items() if key.endswith(("_pattern", "use_dora")) and value]
        # Settings without a component's name belong to the denoiser, which PEFT's files of SD call "unet".
        roles = {key.rpartition(".")[0] for key in settings if key == "r" or key.endswith(".r")}
        scales = {role or DEFAULT_PEFT_ROLE: _scale(settings, f"{role}." if role else "") for role in sorted(roles)}
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(header.path, f"its {METADATA} is not PEFT's settings ({error})") from error
    odd = [key for key in patterns if not key.endswith("use_dora")]
    if odd:
        raise UnsupportedModelError(header.path, f"its {METADATA} has {odd[0]}, which is not read yet")
    return scales


def _scale(settings: dict[str, Any], prefix: str) -> float:
    rank, alpha = int(settings[f"{prefix}r"]), float(settings[f"{prefix}lora_alpha"])
    return alpha / rank**0.5 if settings.get(f"{prefix}use_rslora") else alpha / rank
