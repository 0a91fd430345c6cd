"""Reads the text of AUTOMATIC1111, of Forge and of others that write it.

Source: ``parse_generation_parameters`` in modules/infotext_utils.py of
https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from safelight.pictures import infotext
from safelight.pictures.generation_data import GenerationData, UsedLora, plain, real, text, whole

_TAG = re.compile(r"<lora:([^:>]+)(?::([^:>]+))?[^>]*>")

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
    loras = tuple(
        UsedLora(name, 1.0 if strength is None else strength, hashes.get(name, ""))
        for name, strength in ((match[1], real(match[2])) for match in _TAG.finditer(prompt))
    )
    return GenerationData(
        "A1111",
        prompt,
        text(found.get("Negative prompt")),
        whole(found.get("Seed")),
        whole(found.get("Steps")),
        real(found.get("CFG scale")),
        real(found.get("Distilled CFG Scale")),
        real(found.get("Shift")),
        text(found.get("Sampler")),
        text(found.get("Schedule type")),
        whole(found.get("Size-1")),
        whole(found.get("Size-2")),
        text(found.get("Model")),
        text(found.get("Model hash")),
        text(found.get("VAE")),
        whole(found.get("Clip skip")),
        real(found.get("Denoising strength")),
        loras,
        plain(found, _USED),
    )
