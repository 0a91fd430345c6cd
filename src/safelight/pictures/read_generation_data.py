"""Reads what a picture file says about how it was made: Safelight's own data first, then those of other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from PIL import Image as PILImage

from safelight.files.json_values import json_object, json_objects
from safelight.pictures import infotext
from safelight.pictures.generation_data import (
    GenerationData,
    real,
    text,
    used_lora,
    whole,
)
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
    found = json_object(written)
    request, model = found.get("request"), found.get("model")
    if not isinstance(request, dict) or not isinstance(model, dict):
        return None
    request, model = json_object(request), json_object(model)
    return GenerationData(
        "Safelight",
        prompt=text(request.get("prompt")),
        negative=text(request.get("negative")),
        seed=whole(request.get("seed")),
        steps=whole(request.get("steps")),
        cfg=real(request.get("cfg")),
        guidance=real(request.get("guidance")),
        shift=real(request.get("shift")),
        sampler=text(request.get("sampler")),
        schedule=text(request.get("schedule")),
        width=whole(request.get("width")),
        height=whole(request.get("height")),
        model=text(model.get("name")),
        model_hash=text(model.get("digest")),
        vae=text(request.get("vae")),
        clip_skip=whole(request.get("clip_skip")) or None,
        strength=real(request.get("strength")) if request.get("image") else None,
        loras=tuple(
            used_lora(one.get("name"), one.get("strength"), one.get("digest"))
            for one in json_objects(request.get("loras"))
        ),
    )
