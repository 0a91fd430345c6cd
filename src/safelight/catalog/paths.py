"""References to models and adapters that users write: a text is a path, a digest or a name, by one rule.

- A **path** contains a slash, or has the suffix of a weight file (:data:`ENDINGS`).
- A **digest** has 64 hexadecimal digits: the content of a model or adapter.
- Every other text is a **name**: that of a model in the library, or of its file without the suffix.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from safelight import names
from safelight.errors import InputError


def user_path(text: str) -> Path:
    """Convert a user's text to a path, and expand ``~``. Raises InputError for the home of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: {error}") from error


def did_you_mean(path: Path) -> str:
    """Return a hint for a missing path: the most similar name in its folder. Return "" if there is none."""
    try:
        found = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = [name for name in found if Path(name).stem == path.name] or difflib.get_close_matches(path.name, found, 1)
    return f"; did you mean {near[0]}?" if near else ""


def similar_names(name: str, known: Iterable[str]) -> list[str]:
    """Return at most three of the known names that are similar to ``name``, the most similar first."""
    folded = {names.canonical(one).casefold(): one for one in known}
    return [folded[one] for one in difflib.get_close_matches(names.canonical(name).casefold(), folded, 3, 0.6)]


def stem(path: Path) -> str:
    """Return a file's name without its suffix, or the whole name of a folder (``sd-v1.5``)."""
    return path.name if os.path.isdir(path) else path.stem


ENDINGS = frozenset({".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"})
"""Suffixes of weight files. Text with such a suffix is a path, not a name."""


def is_path(text: str) -> bool:
    """Return whether a user's text is a path and not a name."""
    return "/" in text or os.sep in text or Path(text).suffix.lower() in ENDINGS


_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Return whether a user's text is the digest of a model or adapter."""
    return _DIGEST.fullmatch(text) is not None


def name_of(name_or_path: str) -> str:
    """Return a name without any path of this machine: the name itself, or the file's name without its suffix."""
    return stem(user_path(name_or_path)) if is_path(name_or_path) else name_or_path


def choose_name(name: str | None, path: Path) -> str:
    """Return the name for the file or folder at ``path``: the given name, or one made from the file's.

    Raises InputError for a name that is not allowed.
    """
    if name is None:
        default = names.of_stem(stem(path))
        if not default:
            raise InputError(f"{path}: this file name cannot become a model's name; choose one with --name")
        return default
    wanted = names.canonical(name)
    if not names.is_name(wanted):
        rule = f'1 to {names.MOST_CHARACTERS} characters without / \\ : * ? " < > | ,'
        raise InputError(
            f"{path}: {name!r} is not a valid name: use {rule}, beginning with a letter, digit, _ or bracket"
        )
    return wanted
