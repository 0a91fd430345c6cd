"""What options of the command line have as text, as a request has it."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelight.errors import InputError, RequestError
from safelight.prompts.loras import parsed
from safelight.request.parts import Control, Lora
from safelight.request.schema import MOST_SEED

SEED_HELP = f"The first image's seed, 0 to {MOST_SEED}; each further image adds 1. random or -1 picks and prints one."


def seed_of(text: str | None, default: int | None, count: int) -> int:
    """A seed as it is given; without one the setting ``default_seed``; for ``random``, -1, and where neither says any,
    one for the whole command. Raises RequestError."""
    if text is None and default is not None:
        return default
    if text is None or text.strip().lower() in ("random", "-1"):
        return secrets.randbelow(max(1, MOST_SEED - count))
    try:
        return int(text)
    except ValueError as error:
        raise RequestError("seed", text, f"must be a whole number from 0 to {MOST_SEED}, or random") from error


def default_model(setting: str | None, server: str | None) -> str:
    """The model for a command that names none. Raises InputError where no setting says which."""
    if setting is None:
        where = "one of the server's" if server is not None else "`safelight models list` shows all"
        raise InputError(f"give a model with -m ({where}), or choose one: `safelight config set default_model NAME`")
    return setting


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def folder(out: Path) -> None:
    """Raise InputError for a folder of images that is called like an image, or is a file."""
    if out.suffix.lower() in PICTURES and not out.is_dir():
        raise InputError(f"--out {out}: is the folder for the images; each gets a name of its own, MODEL-SEED.png")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder")


def picture(field: str, path: Path | None, server: str | None) -> str:
    """An image as a request names it: a server is sent the file itself. Raises RequestError."""
    if path is None:
        return ""
    if server is None:
        return str(path)
    try:
        return "data:image/png;base64," + base64.b64encode(path.expanduser().read_bytes()).decode()
    except OSError as error:
        raise RequestError(field, str(path), f"cannot be read: {error.strerror}") from error


def pixels(text: str | None) -> tuple[int, ...]:
    """``left,top,right,bottom``. Raises RequestError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise RequestError("outpaint", text, "must be four numbers of pixels: left,top,right,bottom") from error


def control(text: str, server: str | None) -> Control:
    """``NAME:IMAGE:key=value:…``; a name may be a path, in which no colon is. Raises RequestError."""
    name, *rest = text.split(":")
    if not rest or "=" in rest[0]:
        raise RequestError("control", text, "must be NAME:IMAGE, with more behind: edges:in.png:pre=canny")
    values: dict[str, Any] = {}
    for part in rest[1:]:
        key, _, value = part.partition("=")
        read = _CONTROL_VALUES.get(key)
        if read is None:
            raise RequestError("control", part, f"must be one of {', '.join(f'{known}=' for known in _CONTROL_VALUES)}")
        try:
            values[{"pre": "preprocessor", "resize": "resize_mode"}.get(key, key)] = read(value)
        except ValueError as error:
            raise RequestError("control", part, f"{value!r} is not a number") from error
    return Control(name, picture("control", Path(rest[0]), server), **values)


_CONTROL_VALUES: dict[str, Callable[[str], Any]] = {
    "weight": float,
    "start": float,
    "end": float,
    "mode": str,
    "pre": str,
    "low": int,
    "high": int,
    "resize": str,
}


def lora_of(text: str) -> Lora:
    """``NAME:STRENGTH`` and more, as the command line has it. Raises RequestError."""
    try:
        return parsed(text)
    except ValueError as error:
        raise RequestError("lora", text, str(error)) from error
