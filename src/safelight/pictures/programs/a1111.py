"""Reads the text of AUTOMATIC1111, of Forge and of others that write it.

Source: ``parse_generation_parameters`` in modules/infotext_utils.py of
https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from safelight.pictures import infotext
from safelight.pictures.generation_data import GenerationData, plain, real, text, used_lora, whole

_TAG = re.compile(r"<lora:([^:<>]{1,300})(?::([^:<>]{1,300}))?[^<>]{0,300}>")

_USED = frozenset(
    {
        *("Prompt", "Negative prompt", "Seed", "Steps", "CFG scale", "Distilled CFG Scale", "Shift", "Sampler"),
        *("Schedule type", "Size-1", "Size-2", "Model", "Model hash", "VAE", "Clip skip", "Denoising strength"),
        "Lora hashes",
    }
)


def read(texts: Mapping[str, str]) -> GenerationData | None:
    """Read the text that :func:`safelight.pictures.infotext.read` found (``parameters``)."""
    found = infotext.fields(texts.get("parameters", ""))
    if "Steps" not in found and "Sampler" not in found and "Seed" not in found:
        return None
    prompt = text(found.get("Prompt"))
    hashes = {
        name.strip(): digest.strip()
        for name, _, digest in (part.partition(":") for part in str(found.get("Lora hashes", "")).split(","))
        if name.strip()
    }
    loras = tuple(used_lora(tag[1], tag[2], hashes.get(tag[1], "")) for tag in _TAG.finditer(prompt))
    return GenerationData(
        "A1111",
        prompt=prompt,
        negative=text(found.get("Negative prompt")),
        seed=whole(found.get("Seed")),
        steps=whole(found.get("Steps")),
        cfg=real(found.get("CFG scale")),
        guidance=real(found.get("Distilled CFG Scale")),
        shift=real(found.get("Shift")),
        sampler=text(found.get("Sampler")),
        schedule=text(found.get("Schedule type")),
        width=whole(found.get("Size-1")),
        height=whole(found.get("Size-2")),
        model=text(found.get("Model")),
        model_hash=text(found.get("Model hash")),
        vae=text(found.get("VAE")),
        clip_skip=whole(found.get("Clip skip")),
        strength=real(found.get("Denoising strength")),
        loras=loras,
        others=plain(found, _USED),
    )
