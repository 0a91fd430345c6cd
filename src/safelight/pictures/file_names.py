"""The names of picture files."""

from __future__ import annotations

import time

from safelight.file_patterns import DEFAULT
from safelight.names import readable
from safelight.request.results import Image

PROMPT_CHARACTERS = 60


def file_stem(image: Image, pattern: str = DEFAULT) -> str:
    """Return the path of an image's file in the output folder, without the ending. It has "/" for subfolders.

    ``pattern``: see :mod:`safelight.file_patterns`. A value's signs that file names cannot have become "-".
    """
    request = image.metadata.get("request", {})
    now = time.localtime()
    values = {
        "date": time.strftime("%Y-%m-%d", now),
        "time": time.strftime("%H-%M-%S", now),
        "model": image.model,
        "seed": str(image.seed),
        "prompt": str(request.get("prompt", ""))[:PROMPT_CHARACTERS],
        "width": str(image.width),
        "height": str(image.height),
        "steps": str(request.get("steps", "")),
        "sampler": str(request.get("sampler", "")),
    }
    named = {name: readable(value) for name, value in values.items()}
    return "/".join(readable(part.format(**named)) for part in pattern.split("/"))
