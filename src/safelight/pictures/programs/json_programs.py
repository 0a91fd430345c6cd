"""Reads the programs that write one JSON object: InvokeAI, NovelAI, Fooocus, SwarmUI and Draw Things.

Sources:
- InvokeAI: ``CoreMetadataInvocation`` in invokeai/app/invocations/metadata.py (version 3 on), and ``sd-metadata`` (2)
- NovelAI: the texts ``Description`` and ``Comment`` of its PNG files
- Fooocus: ``FooocusMetadataParser`` in modules/meta_parser.py
- SwarmUI: ``sui_image_params`` in src/Text2Image/T2IParamInput.cs
- Draw Things: the JSON in Exif's UserComment, which XMP has in PNG files
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from safelight.pictures.generation_data import GenerationData, UsedLora, file_stem, plain, real, text, whole

Values = dict[str, Any]

_XMP_COMMENT = re.compile(r"<exif:UserComment>.*?<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)


def _object(written: object) -> Values:
    """Parse JSON. Returns an empty dict for what is no object."""
    try:
        found: Any = json.loads(written) if isinstance(written, str) else written
    except (ValueError, RecursionError):
        return {}
    return cast("Values", found) if isinstance(found, dict) else {}


def _listed(value: object) -> list[Values]:
    rows = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Values", row) for row in rows if isinstance(row, dict)]


def read_invokeai(texts: Mapping[str, str]) -> GenerationData | None:
    """Read InvokeAI's values, of version 3 to 6, or of version 2."""
    found = _object(texts.get("invokeai_metadata"))
    if not found:
        return _invokeai_2(_object(texts.get("sd-metadata")))
    model, vae = _object(found.get("model")), _object(found.get("vae"))
    loras = tuple(
        UsedLora(
            text(which.get("name") or which.get("model_name")),
            1.0 if (weight := real(row.get("weight"))) is None else weight,
            text(which.get("hash")),
        )
        for row in _listed(found.get("loras"))
        for which in [_object(row.get("model") or row.get("lora"))]
    )
    used = frozenset(
        {
            *("positive_prompt", "negative_prompt", "seed", "steps", "cfg_scale", "guidance", "scheduler", "width"),
            *("height", "model", "vae", "clip_skip", "strength", "loras"),
        }
    )
    return GenerationData(
        "InvokeAI",
        text(found.get("positive_prompt")),
        text(found.get("negative_prompt")),
        whole(found.get("seed")),
        whole(found.get("steps")),
        real(found.get("cfg_scale")),
        real(found.get("guidance")),
        None,
        text(found.get("scheduler")),
        "",
        whole(found.get("width")),
        whole(found.get("height")),
        text(model.get("name") or model.get("model_name")),
        text(model.get("hash")),
        text(vae.get("name") or vae.get("model_name")),
        whole(found.get("clip_skip")) or None,
        real(found.get("strength")),
        loras,
        plain(found, used),
    )


def _invokeai_2(found: Values) -> GenerationData | None:
    image = _object(found.get("image"))
    if not image:
        return None
    prompts = image.get("prompt")
    written = prompts if isinstance(prompts, str) else " ".join(text(row.get("prompt")) for row in _listed(prompts))
    # Version 2 has the negative prompt in brackets within the prompt.
    negative = " ".join(re.findall(r"\[([^\[\]]*)\]", written))
    used = frozenset({"prompt", "seed", "steps", "cfg_scale", "sampler", "width", "height"})
    return GenerationData(
        "InvokeAI",
        re.sub(r"\s*\[[^\[\]]*\]\s*", " ", written).strip(),
        negative,
        whole(image.get("seed")),
        whole(image.get("steps")),
        real(image.get("cfg_scale")),
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
    found = _object(texts.get("Comment"))
    captions = _object(_object(_object(found.get("v4_negative_prompt")).get("caption")))
    used = frozenset(
        {
            *("prompt", "uc", "seed", "steps", "scale", "sampler", "noise_schedule", "width", "height", "strength"),
            "v4_negative_prompt",
        }
    )
    return GenerationData(
        "NovelAI",
        text(found.get("prompt")) or text(texts.get("Description")),
        text(found.get("uc")) or text(captions.get("base_caption")),
        whole(found.get("seed")),
        whole(found.get("steps")),
        real(found.get("scale")),
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
    found = _object(texts.get("parameters")) or _object(texts.get("Comment"))
    if "base_model" not in found or "prompt" not in found:
        return None
    width, height = _fooocus_size(found)
    loras: list[UsedLora] = []
    for row in cast("list[object]", found["loras"]) if isinstance(found.get("loras"), list) else []:
        parts = cast("list[object]", row) if isinstance(row, list) else []
        if len(parts) >= 2:
            strength = real(parts[1])
            digest = text(parts[2]) if len(parts) > 2 else ""
            loras.append(UsedLora(file_stem(text(parts[0])), 1.0 if strength is None else strength, digest))
    used = frozenset(
        {
            *("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "sampler", "scheduler", "resolution"),
            *("base_model", "base_model_hash", "vae", "clip_skip", "loras", "width", "height", "cfg"),
        }
    )
    return GenerationData(
        "Fooocus",
        text(found.get("prompt")),
        text(found.get("negative_prompt")),
        whole(found.get("seed")),
        whole(found.get("steps")),
        real(found.get("guidance_scale", found.get("cfg"))),
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
    found = _object(_object(texts.get("parameters")).get("sui_image_params"))
    if not found:
        return None
    names = cast("list[object]", found["loras"]) if isinstance(found.get("loras"), list) else []
    weights = cast("list[object]", found["loraweights"]) if isinstance(found.get("loraweights"), list) else []
    strengths = [real(weight) for weight in weights] + [1.0] * len(names)
    used = frozenset(
        {
            *("prompt", "negativeprompt", "seed", "steps", "cfgscale", "fluxguidancescale", "sigmashift", "sampler"),
            *("comfyuisampler", "scheduler", "comfyuischeduler", "width", "height", "model", "vae", "loras"),
            *("loraweights", "initimagecreativity"),
        }
    )
    return GenerationData(
        "SwarmUI",
        text(found.get("prompt")),
        text(found.get("negativeprompt")),
        whole(found.get("seed")),
        whole(found.get("steps")),
        real(found.get("cfgscale")),
        real(found.get("fluxguidancescale")),
        real(found.get("sigmashift")),
        text(found.get("sampler") or found.get("comfyuisampler")),
        text(found.get("scheduler") or found.get("comfyuischeduler")),
        whole(found.get("width")),
        whole(found.get("height")),
        file_stem(text(found.get("model"))),
        vae=file_stem(text(found.get("vae"))),
        strength=real(found.get("initimagecreativity")),
        loras=tuple(
            UsedLora(file_stem(text(name)), 1.0 if strength is None else strength)
            for name, strength in zip(names, strengths, strict=False)
        ),
        others=plain(found, used),
    )


def read_draw_things(texts: Mapping[str, str]) -> GenerationData | None:
    """Read Draw Things' values."""
    found = _object(texts.get("exif comment"))
    if "uc" not in found:
        inner = _XMP_COMMENT.search(texts.get("XML:com.adobe.xmp", ""))
        found = _object(_unescaped(inner[1])) if inner else {}
    if "c" not in found or "uc" not in found:
        return None
    size = re.fullmatch(r"(\d+)x(\d+)", text(found.get("size")))
    used = frozenset(
        {*("c", "uc", "seed", "steps", "scale", "sampler", "size", "model", "strength", "lora", "shift", "v2")}
    )
    return GenerationData(
        "Draw Things",
        text(found.get("c")),
        text(found.get("uc")),
        whole(found.get("seed")),
        whole(found.get("steps")),
        real(found.get("scale")),
        shift=real(found.get("shift")),
        sampler=text(found.get("sampler")),
        width=whole(size[1]) if size else None,
        height=whole(size[2]) if size else None,
        model=file_stem(text(found.get("model"))),
        strength=real(found.get("strength")),
        loras=tuple(
            UsedLora(file_stem(text(row.get("model"))), 1.0 if (weight := real(row.get("weight"))) is None else weight)
            for row in _listed(found.get("lora"))
        ),
        others=plain(found, used),
    )


def _unescaped(written: str) -> str:
    for escaped, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#xA;", "\n"), ("&amp;", "&")):
        written = written.replace(escaped, sign)
    return written
