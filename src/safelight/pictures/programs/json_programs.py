"""Reads the programs that write one JSON object: InvokeAI, NovelAI, Fooocus, SwarmUI and Draw Things.

Sources:
- InvokeAI: ``CoreMetadataInvocation`` in invokeai/app/invocations/metadata.py (version 3 on), and ``sd-metadata`` (2)
- NovelAI: the texts ``Description`` and ``Comment`` of its PNG files
- Fooocus: ``FooocusMetadataParser`` in modules/meta_parser.py
- SwarmUI: ``sui_image_params`` in src/Text2Image/T2IParamInput.cs
- Draw Things: the JSON in Exif's UserComment, which XMP has in PNG files
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, cast

from safelight.files.json_values import json_object, json_objects
from safelight.pictures.generation_data import (
    GenerationData,
    UsedLora,
    file_stem,
    plain,
    real,
    text,
    used_lora,
    whole,
)

Values = dict[str, Any]


def read_invokeai(texts: Mapping[str, str]) -> GenerationData | None:
    """Read InvokeAI's values, of version 3 to 6, or of version 2."""
    found = json_object(texts.get("invokeai_metadata"))
    if not found:
        return _invokeai_2(json_object(texts.get("sd-metadata")))
    model, vae = json_object(found.get("model")), json_object(found.get("vae"))
    loras = tuple(
        used_lora(which.get("name") or which.get("model_name"), row.get("weight"), which.get("hash"))
        for row in json_objects(found.get("loras"))
        for which in [json_object(row.get("model") or row.get("lora"))]
    )
    used = frozenset(
        {
            *("positive_prompt", "negative_prompt", "seed", "steps", "cfg_scale", "guidance", "scheduler", "width"),
            *("height", "model", "vae", "clip_skip", "strength", "loras"),
        }
    )
    return GenerationData(
        "InvokeAI",
        prompt=text(found.get("positive_prompt")),
        negative=text(found.get("negative_prompt")),
        seed=whole(found.get("seed")),
        steps=whole(found.get("steps")),
        cfg=real(found.get("cfg_scale")),
        guidance=real(found.get("guidance")),
        sampler=text(found.get("scheduler")),
        width=whole(found.get("width")),
        height=whole(found.get("height")),
        model=text(model.get("name") or model.get("model_name")),
        model_hash=text(model.get("hash")),
        vae=text(vae.get("name") or vae.get("model_name")),
        clip_skip=whole(found.get("clip_skip")) or None,
        strength=real(found.get("strength")),
        loras=loras,
        others=plain(found, used),
    )


def _invokeai_2(found: Values) -> GenerationData | None:
    image = json_object(found.get("image"))
    if not image:
        return None
    prompts = image.get("prompt")
    written = (
        prompts if isinstance(prompts, str) else " ".join(text(row.get("prompt")) for row in json_objects(prompts))
    )
    # Version 2 has the negative prompt in brackets within the prompt.
    negative = " ".join(re.findall(r"\[([^\[\]]*)\]", written))
    used = frozenset({"prompt", "seed", "steps", "cfg_scale", "sampler", "width", "height"})
    return GenerationData(
        "InvokeAI",
        prompt=text(re.sub(r" ?\[[^\[\]]*\] ?", " ", written)),
        negative=text(negative),
        seed=whole(image.get("seed")),
        steps=whole(image.get("steps")),
        cfg=real(image.get("cfg_scale")),
        sampler=text(image.get("sampler")),
        width=whole(image.get("width")),
        height=whole(image.get("height")),
        model=text(found.get("model_weights")),
        model_hash=text(found.get("model_hash")),
        others=plain(image, used),
    )


def read_novelai(texts: Mapping[str, str]) -> GenerationData | None:
    """Read NovelAI's values."""
    if "NovelAI" not in texts.get("Software", ""):
        return None
    found = json_object(texts.get("Comment"))
    captions = json_object(json_object(found.get("v4_negative_prompt")).get("caption"))
    used = frozenset(
        {
            *("prompt", "uc", "seed", "steps", "scale", "sampler", "noise_schedule", "width", "height", "strength"),
            "v4_negative_prompt",
        }
    )
    return GenerationData(
        "NovelAI",
        prompt=text(found.get("prompt")) or text(texts.get("Description")),
        negative=text(found.get("uc")) or text(captions.get("base_caption")),
        seed=whole(found.get("seed")),
        steps=whole(found.get("steps")),
        cfg=real(found.get("scale")),
        sampler=text(found.get("sampler")),
        schedule=text(found.get("noise_schedule")),
        width=whole(found.get("width")),
        height=whole(found.get("height")),
        model=text(texts.get("Source")),
        strength=real(found.get("strength")),
        others=plain(found, used),
    )


def read_fooocus(texts: Mapping[str, str]) -> GenerationData | None:
    """Read Fooocus' own scheme. Its other scheme is A1111's text."""
    found = json_object(texts.get("parameters")) or json_object(texts.get("Comment"))
    if "base_model" not in found or "prompt" not in found:
        return None
    width, height = _fooocus_size(found)
    loras: list[UsedLora] = []
    for row in cast("list[object]", found["loras"]) if isinstance(found.get("loras"), list) else []:
        parts = cast("list[object]", row) if isinstance(row, list) else []
        if len(parts) >= 2:
            loras.append(used_lora(file_stem(text(parts[0])), *parts[1:3]))
    used = frozenset(
        {
            *("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "sampler", "scheduler", "resolution"),
            *("base_model", "base_model_hash", "vae", "clip_skip", "loras", "width", "height", "cfg"),
        }
    )
    return GenerationData(
        "Fooocus",
        prompt=text(found.get("prompt")),
        negative=text(found.get("negative_prompt")),
        seed=whole(found.get("seed")),
        steps=whole(found.get("steps")),
        cfg=real(found.get("guidance_scale", found.get("cfg"))),
        sampler=text(found.get("sampler")),
        schedule=text(found.get("scheduler")),
        width=width,
        height=height,
        model=file_stem(text(found.get("base_model"))),
        model_hash=text(found.get("base_model_hash")),
        vae=file_stem(text(found.get("vae"))),
        clip_skip=whole(found.get("clip_skip")),
        loras=tuple(loras),
        others=plain(found, used),
    )


def _fooocus_size(found: Values) -> tuple[int | None, int | None]:
    """Return the size, which Fooocus writes as ``(896, 1152)``."""
    numbers = re.findall(r"\d+", str(found.get("resolution", "")))
    if len(numbers) == 2:
        return whole(numbers[0]), whole(numbers[1])
    return whole(found.get("width")), whole(found.get("height"))


def read_swarmui(texts: Mapping[str, str]) -> GenerationData | None:
    """Read SwarmUI's values."""
    found = json_object(json_object(texts.get("parameters")).get("sui_image_params"))
    if not found:
        return None
    names = cast("list[object]", found["loras"]) if isinstance(found.get("loras"), list) else []
    weights = cast("list[object]", found["loraweights"]) if isinstance(found.get("loraweights"), list) else []
    strengths = [*weights, *[None] * len(names)]
    used = frozenset(
        {
            *("prompt", "negativeprompt", "seed", "steps", "cfgscale", "fluxguidancescale", "sigmashift", "sampler"),
            *("comfyuisampler", "scheduler", "comfyuischeduler", "width", "height", "model", "vae", "loras"),
            *("loraweights", "initimagecreativity"),
        }
    )
    return GenerationData(
        "SwarmUI",
        prompt=text(found.get("prompt")),
        negative=text(found.get("negativeprompt")),
        seed=whole(found.get("seed")),
        steps=whole(found.get("steps")),
        cfg=real(found.get("cfgscale")),
        guidance=real(found.get("fluxguidancescale")),
        shift=real(found.get("sigmashift")),
        sampler=text(found.get("sampler") or found.get("comfyuisampler")),
        schedule=text(found.get("scheduler") or found.get("comfyuischeduler")),
        width=whole(found.get("width")),
        height=whole(found.get("height")),
        model=file_stem(text(found.get("model"))),
        vae=file_stem(text(found.get("vae"))),
        strength=real(found.get("initimagecreativity")),
        loras=tuple(
            used_lora(file_stem(text(name)), strength) for name, strength in zip(names, strengths, strict=False)
        ),
        others=plain(found, used),
    )


def read_draw_things(texts: Mapping[str, str]) -> GenerationData | None:
    """Read Draw Things' values."""
    found = json_object(texts.get("exif comment"))
    if "uc" not in found:
        found = json_object(html.unescape(_xmp_comment(texts.get("XML:com.adobe.xmp", ""))))
    if "c" not in found or "uc" not in found:
        return None
    size = re.fullmatch(r"(\d+)x(\d+)", text(found.get("size")))
    used = frozenset(
        {*("c", "uc", "seed", "steps", "scale", "sampler", "size", "model", "strength", "lora", "shift", "v2")}
    )
    return GenerationData(
        "Draw Things",
        prompt=text(found.get("c")),
        negative=text(found.get("uc")),
        seed=whole(found.get("seed")),
        steps=whole(found.get("steps")),
        cfg=real(found.get("scale")),
        shift=real(found.get("shift")),
        sampler=text(found.get("sampler")),
        width=whole(size[1]) if size else None,
        height=whole(size[2]) if size else None,
        model=file_stem(text(found.get("model"))),
        strength=real(found.get("strength")),
        loras=tuple(
            used_lora(file_stem(text(row.get("model"))), row.get("weight")) for row in json_objects(found.get("lora"))
        ),
        others=plain(found, used),
    )


def _xmp_comment(xmp: str) -> str:
    """Return the first text of Exif's UserComment in XMP, "" if there is none."""
    _, _, comment = xmp.partition("<exif:UserComment>")
    _, _, item = comment.partition("<rdf:li")
    return item.partition(">")[2].partition("</rdf:li>")[0]
