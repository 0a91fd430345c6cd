"""Paths and names as people write them."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from safelight.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def user_path(text: str) -> Path:
    """A path as a person writes it. Raises InputError for a home that nobody has."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: {error}") from error


def beside(path: Path) -> str:
    """What lies there under almost that name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = [name for name in names if Path(name).stem == path.name] or difflib.get_close_matches(path.name, names, 1)
    return f"; {near[0]} does" if near else ""


def stem(path: Path) -> str:
    """What to call a model: the file's name without its ending, the whole name of a folder (``sd-v1.5``)."""
    return path.name if os.path.isdir(path) else path.stem


def chosen(name: str | None, path: Path) -> str:
    """The name to give to what is at ``path``. Raises InputError for one that is not allowed."""
    wanted = name or re.sub(r"[^A-Za-z0-9._+-]+", "-", stem(path)).strip("-.")
    if not NAME.fullmatch(wanted):
        raise InputError(f"{wanted!r} is not a name: letters, digits and . _ + - (give one with --name)")
    return wanted
