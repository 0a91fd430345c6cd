"""The metadata in a picture file: a text as AUTOMATIC1111 writes it, and Safelight's own as JSON.

:mod:`safelight.pictures.file_format` says where a file of each format has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image as PILImage

from safelight.errors import CorruptFileError, UnreadableFileError
from safelight.files.disk import open_regular
from safelight.pictures import xmp
from safelight.request.adapters import Lora
from safelight.request.field import fields_of
from safelight.request.prompts.loras import lora_to_tag, taggable
from safelight.request.samplers import SAMPLERS, SCHEDULE_LABELS, Schedule, a1111_name
from safelight.request.schema import VERSION, Request
from safelight.request.values import UPSCALERS

_IMAGE_CFG = fields_of(Request)["image_cfg"].default


def schedule_label(sampler: str, schedule: Schedule) -> str:
    """AUTOMATIC1111's name of a schedule. The default is Automatic, if AUTOMATIC1111 uses it for this sampler too."""
    if schedule == "default" == _automatic(sampler):
        return "Automatic"
    return SCHEDULE_LABELS[schedule]


def _automatic(sampler: str) -> Schedule:
    """AUTOMATIC1111's schedule for a sampler; the default for a sampler that is not installed any more."""
    return SAMPLERS[sampler].automatic if sampler in SAMPLERS else "default"


def parameters(metadata: Mapping[str, Any]) -> str:
    """The generation parameters as a text that AUTOMATIC1111 and similar tools read."""
    request, model = metadata["request"], metadata["model"]
    loras = [Lora(**lora) for lora in request.get("loras", ())]
    sampler = a1111_name(request["sampler"])
    fields = {
        "Steps": request["steps"],
        "Sampler": sampler,
        "Schedule type": schedule_label(request["sampler"], request["schedule"]),
        "CFG scale": request["cfg"],
        "Seed": request["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": model["digest"][:10],
        "Model": model["name"],
    }
    if request.get("guidance") is not None:
        fields["Distilled CFG Scale"] = request["guidance"]
    if request.get("shift") is not None:
        fields["Shift"] = request["shift"]
    if request.get("first_block_cache"):
        fields["First block cache"] = request["first_block_cache"]
    if request["clip_skip"]:
        fields["Clip skip"] = request["clip_skip"] + 1
    if request.get("image"):
        fields["Denoising strength"] = request["strength"]
        if request.get("image_cfg", _IMAGE_CFG) != _IMAGE_CFG:
            fields["Image CFG scale"] = request["image_cfg"]
    if request.get("mask"):
        fields["Mask blur"] = request["mask_blur"]
    fields |= _optional_fields(request)
    if loras:
        fields["Lora hashes"] = ", ".join(f"{taggable(lora.name)}: {lora.digest[:12]}" for lora in loras)
    fields["Version"] = f"Safelight {metadata['run']['versions']['safelight']}"
    lines = [" ".join([request["prompt"], *(lora_to_tag(lora) for lora in loras)])]
    if request["negative"]:
        lines.append(f"Negative prompt: {request['negative']}")
    lines.append(", ".join(f"{key}: {quoted(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def quoted(value: object) -> str:
    """A value as AUTOMATIC1111 writes it: a JSON string if a part of it could be read as another field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:\n"') else text


def _optional_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """AUTOMATIC1111's fields of variations, the hires fix, tiling, textual inversions and the ControlNet extension."""
    out: dict[str, Any] = {}
    if request.get("variation_strength"):
        out |= {"Variation seed": request["variation_seed"], "Variation seed strength": request["variation_strength"]}
    if request.get("hires_scale", 1) > 1:
        out["Denoising strength"] = request["hires_strength"]
        out["Hires upscale"] = request["hires_scale"]
        if request["hires_steps"]:
            out["Hires steps"] = request["hires_steps"]
        out["Hires upscaler"] = UPSCALERS[request["hires_upscaler"]]
    if request.get("refiner"):
        out["Refiner"] = f"{request['refiner']} [{request['refiner_digest'][:10]}]"
        out["Refiner switch at"] = request["refiner_start"]
    if request.get("seamless"):
        out["Tiling"] = True
    for number, control in enumerate(request.get("controls", ())):
        unit = {
            "Module": control["preprocessor"],
            "Model": f"{taggable(control['name'])} [{control['digest'][:8]}]",
            "Weight": control["weight"],
            "Guidance Start": control["start"],
            "Guidance End": control["end"],
            "Control Mode": CONTROL_LABELS[control["mode"]],
        }
        out[f"ControlNet {number}"] = ", ".join(f"{key}: {value}" for key, value in unit.items())
    if request.get("embeddings"):
        out["TI hashes"] = ", ".join(f"{taggable(e['name'])}: {e['digest'][:12]}" for e in request["embeddings"])
    return out


CONTROL_LABELS = {
    "balanced": "Balanced",
    "more_prompt": "My prompt is more important",
    "more_control": "ControlNet is more important",
    "unbalanced": "Unbalanced",
}


def read(path: Path) -> tuple[Mapping[str, Any], str]:
    """Read a picture file. Returns its ``safelight`` metadata, and the SHA-256 of the pixels that it contains now.

    Raises:
        CorruptFileError: Safelight did not make the image, or its metadata is damaged.
        UnreadableFileError: the file cannot be opened, or a newer version wrote it.
    """
    descriptor, _ = open_regular(path)
    try:
        with open(descriptor, "rb") as file, PILImage.open(file) as image:
            text = image.info.get("safelight") or xmp.find(image.info.get("xmp"))
            pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise CorruptFileError(path, f"is not a readable image ({error})") from error
    if not isinstance(text, str):
        why = "It is a sheet, or another program made it or saved it again."
        raise CorruptFileError(path, f"has no safelight metadata. {why}")
    try:
        metadata: Any = json.loads(text)
        if isinstance(metadata["version"], int) and metadata["version"] > VERSION:
            raise UnreadableFileError(
                path, f"a newer Safelight wrote it (metadata version {metadata['version']}); update Safelight"
            )
        request, model, run = metadata["request"], metadata["model"], metadata["run"]
        texts = (metadata["pixels_sha256"], model["digest"], request["model"], run["device"], run["dtype"])
        sound = all(isinstance(text, str) for text in (*texts, run["attention"], *run["versions"].values()))
        sound = sound and isinstance(metadata["version"], int) and isinstance(request["width"], int)
        sound = sound and isinstance(run["threads"], int)
        sound = sound and all(isinstance(metadata.get(name, {}), dict) for name in ("numerics", "extensions"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(path, f"its safelight metadata is damaged ({error})") from error
    if not sound:
        raise CorruptFileError(path, "its safelight metadata is damaged")
    return cast("Mapping[str, Any]", metadata), pixels
