"""Reads what a picture file says about how it was made: Safelight's own data first, then those of other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from PIL import Image as PILImage

from safelight.pictures import infotext
from safelight.pictures.generation_data import GenerationData, UsedLora, real, text, whole
from safelight.pictures.programs import a1111, comfyui, json_programs

READERS: tuple[Callable[[Mapping[str, str]], GenerationData | None], ...] = (
    json_programs.read_invokeai,
    json_programs.read_novelai,
    json_programs.read_swarmui,
    json_programs.read_fooocus,
    json_programs.read_draw_things,
    a1111.read,
    comfyui.read,
)
"""The most certain first. A program may write A1111's text beside its own data; then its own data come first."""


def read(image: PILImage.Image) -> GenerationData | None:
    """Read an opened picture. Returns None if it says nothing about how it was made."""
    parameters, items = infotext.read(image)
    texts = {name: value for name, value in items.items() if isinstance(value, str)}
    if parameters:
        texts["parameters"] = parameters
    own = _safelight(texts.get("safelight", ""))
    if own is not None:
        return own
    found = (reader(texts) for reader in READERS)
    return next((one for one in found if one is not None), None)


def _safelight(written: str) -> GenerationData | None:
    try:
        found: Any = json.loads(written)
        request = cast("dict[str, Any]", found["request"])
        model = cast("dict[str, Any]", found["model"])
        loras = tuple(
            UsedLora(str(one["name"]), float(one.get("strength", 1.0)), str(one.get("digest", "")))
            for one in cast("list[dict[str, Any]]", request.get("loras") or [])
        )
        name, digest = model.get("name"), model.get("digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return GenerationData(
        "Safelight",
        text(request.get("prompt")),
        text(request.get("negative")),
        whole(request.get("seed")),
        whole(request.get("steps")),
        real(request.get("cfg")),
        real(request.get("guidance")),
        real(request.get("shift")),
        text(request.get("sampler")),
        text(request.get("schedule")),
        whole(request.get("width")),
        whole(request.get("height")),
        text(name),
        text(digest),
        text(request.get("vae")),
        whole(request.get("clip_skip")) or None,
        real(request.get("strength")) if request.get("image") else None,
        loras,
    )
