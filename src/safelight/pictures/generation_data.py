"""What a picture file says about how it was made, whichever program made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Program = Literal[
    "Safelight", "A1111", "ComfyUI", "InvokeAI", "NovelAI", "Fooocus", "SwarmUI", "Draw Things", "unknown program"
]


@dataclass(frozen=True, slots=True)
class UsedLora:
    """A LoRA. ``digest``: as the program writes it, "" if it does not."""

    name: str
    strength: float = 1.0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class GenerationData:
    """How a picture was made. A value that the file does not have is None, or "" if it is a text.

    ``program``: the one that made it. A1111 also stands for Forge and others that write its text.
    ``cfg``: the scale of classifier-free guidance. ``guidance``: that of a distilled model.
    ``sampler``, ``schedule``, ``model``, ``model_hash``, ``vae``: as the program names them.
    ``strength``: how much of an input image was drawn again.
    ``others``: what else the file says, as text.
    """

    program: Program
    prompt: str = ""
    negative: str = ""
    seed: int | None = None
    steps: int | None = None
    cfg: float | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str = ""
    schedule: str = ""
    width: int | None = None
    height: int | None = None
    model: str = ""
    model_hash: str = ""
    vae: str = ""
    clip_skip: int | None = None
    strength: float | None = None
    loras: tuple[UsedLora, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict[str, str])


MOST_NUMBER = 10**30
"""No value of a picture is larger."""


def whole(value: object) -> int | None:
    """Return a whole number, None if a value is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < MOST_NUMBER else None
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,25}\s*", value):
        # Seeds have up to 64 bits, more than a float.
        return int(value)
    number = real(value)
    return int(number) if number is not None and number == int(number) else None


def real(value: object) -> float | None:
    """Return a finite number, None if a value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e30 else None


def text(value: object) -> str:
    """Return a text; "" for a value that is none."""
    return _encodable(value).strip() if isinstance(value, str) else ""


def _encodable(value: str) -> str:
    """Replace half characters: JSON can write one, but no file and no answer can hold it."""
    return value.encode(errors="replace").decode()


def plain(values: Mapping[str, Any], used: frozenset[str]) -> dict[str, str]:
    """Return what is left of a program's values, as text."""
    left = {key: value for key, value in values.items() if key not in used and value not in (None, "", [], {})}
    return {_encodable(key): _encodable(str(value)) for key, value in left.items()}


def used_lora(name: object, strength: object, digest: object = "") -> UsedLora:
    """Return a LoRA. Programs leave its strength out if it is 1."""
    number = real(strength)
    return UsedLora(text(name), 1.0 if number is None else number, text(digest))


def file_stem(name: str) -> str:
    """Return the name of a file without folders and ending, as people call a model."""
    last = name.replace("\\", "/").rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    return stem if dot and ending.lower() in ("safetensors", "ckpt", "gguf", "pt", "pth", "sft", "bin") else last
