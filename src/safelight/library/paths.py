"""Paths as people write them, and the names of what is there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from safelight import names
from safelight.errors import InputError


def user_path(text: str) -> Path:
    """A path as a person writes it. Raises InputError for a home that nobody has."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: {error}") from error


def beside(path: Path) -> str:
    """What lies there under almost that name."""
    try:
        found = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = [name for name in found if Path(name).stem == path.name] or difflib.get_close_matches(path.name, found, 1)
    return f"; {near[0]} does" if near else ""


def near(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that may have been meant, the most alike first."""
    folded = {names.canonical(one).casefold(): one for one in known}
    return [folded[one] for one in difflib.get_close_matches(names.canonical(name).casefold(), folded, 3, 0.6)]


def stem(path: Path) -> str:
    """What a file is called: its name without its ending, the whole name of a folder (``sd-v1.5``)."""
    return path.name if os.path.isdir(path) else path.stem


ENDINGS = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})
"""Of files of weights: what ends so is a path, not a name."""


def is_path(text: str) -> bool:
    """Whether a person means a path and not a name."""
    return "/" in text or os.sep in text or Path(text).suffix.lower() in ENDINGS


def name_of(name_or_path: str) -> str:
    """What to call it where a path of this machine has no business: the name itself, or the file's."""
    return stem(user_path(name_or_path)) if is_path(name_or_path) else name_or_path


def chosen(name: str | None, path: Path) -> str:
    """The name to give to what is at ``path``: the given one, or the file's own. Raises InputError for one that is not
    allowed."""
    if name is None:
        made = names.of_stem(stem(path))
        if not made:
            raise InputError(f"{path}: no name can be made of this file's; give one with --name")
        return made
    wanted = names.canonical(name)
    if not names.is_name(wanted):
        rule = f'1 to {names.MOST_CHARACTERS} characters without / \\ : * ? " < > | ,'
        raise InputError(f"{path}: {name!r} cannot be its name: {rule}; a letter, digit, _ or bracket comes first")
    return wanted
