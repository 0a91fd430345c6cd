"""Converts the texts of command-line options to the values of a request."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import InputError, RequestError
from safelight.request.adapters import Control, Lora
from safelight.request.bounds import MOST_SEED
from safelight.request.prompts.loras import parse_lora

if TYPE_CHECKING:
    from safelight.queue.image_files import FileForm
    from safelight.settings import Settings

SEED_HELP = (
    f"The seed of the first image, 0 to {MOST_SEED}; each further image adds 1. random or -1: choose one and print it."
)


def seed_of(text: str | None, default: int | None, count: int) -> int:
    """The seed of the first image: ``text``, or the setting ``default_seed`` if ``text`` is None.

    If both are None, or ``text`` is ``random`` or -1: a random seed for the whole command. Raises RequestError.
    """
    if text is None and default is not None:
        return default
    if text is None or text.strip().lower() in ("random", "-1"):
        return secrets.randbelow(max(1, MOST_SEED - count))
    try:
        return int(text)
    except ValueError as error:
        raise RequestError("seed", text, f"must be a whole number from 0 to {MOST_SEED}, or random") from error


def default_model(setting: str | None, server: str | None) -> str:
    """The model for a command without -m. Raises InputError if the setting ``default_model`` is unset too."""
    if setting is None:
        where = "one of the server's models" if server is not None else "`safelight models list` shows all"
        raise InputError(f"choose a model with -m ({where}), or set one: `safelight config set default_model NAME`")
    return setting


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def folder(out: Path) -> None:
    """Check the folder for images. Raises InputError if it is a file, or has the name of an image file."""
    if out.suffix.lower() in PICTURES and not out.is_dir():
        raise InputError(f"--out {out}: must be a folder, not a file; --image-names names the files in it")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder")


def file_form(settings: Settings) -> FileForm:
    """Return how the commands write images."""
    from safelight.queue.image_files import FileForm

    return FileForm(settings.image_format, settings.image_quality, settings.image_names)


def picture(field: str, path: Path | None, server: str | None) -> str:
    """The value of a picture in a request: its path or, for a server, a data URL of the file. Raises RequestError."""
    if path is None:
        return ""
    if server is None:
        return str(path)
    try:
        return "data:image/png;base64," + base64.b64encode(path.expanduser().read_bytes()).decode()
    except OSError as error:
        raise RequestError(field, str(path), f"cannot be read: {error.strerror}") from error


def pixels(text: str | None) -> tuple[int, ...]:
    """Parse ``left,top,right,bottom``, in pixels. Raises RequestError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise RequestError("outpaint", text, "must be four whole numbers of pixels: left,top,right,bottom") from error


def control(text: str, server: str | None) -> Control:
    """Parse ``NAME:IMAGE:key=value:…``. A name may be a path without colons. Raises RequestError."""
    name, *rest = text.split(":")
    if not rest or "=" in rest[0]:
        raise RequestError("control", text, "must be NAME:IMAGE with optional values, such as edges:in.png:pre=canny")
    values: dict[str, Any] = {}
    for part in rest[1:]:
        key, _, value = part.partition("=")
        read = _CONTROL_VALUES.get(key)
        if read is None:
            raise RequestError("control", part, f"must be one of {', '.join(f'{known}=' for known in _CONTROL_VALUES)}")
        try:
            values[_CONTROL_FIELDS.get(key, key)] = read(value)
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
    "type": str,
}

_CONTROL_FIELDS = {"pre": "preprocessor", "resize": "resize_mode", "type": "union_type"}


def lora_of(text: str) -> Lora:
    """Parse ``NAME:STRENGTH`` and its other forms. Raises RequestError."""
    try:
        return parse_lora(text)
    except ValueError as error:
        raise RequestError("lora", text, str(error)) from error
