"""Names of models and adapters, and the file names made from them."""

from __future__ import annotations

import hashlib
import re
import unicodedata

MOST_CHARACTERS = 100

FORBIDDEN = re.compile(r'[/\\:*?"<>|,\x00-\x1f\x7f]+')
"""Characters that names may not contain, because they separate names in prompts, options and paths."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*[A-Za-z0-9_+-]|[A-Za-z0-9]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, with any suffix."""

MOST_BYTES = 120
"""Limit of bytes in a file name made from a name. File systems allow 255, but suffixes and numbers follow."""


def canonical(name: str) -> str:
    """Return the name in Unicode's composed form (NFC). macOS stores file names in the decomposed form."""
    return unicodedata.normalize("NFC", name)


def is_name(text: str) -> bool:
    """Return whether a text is a valid name of a model or adapter.

    A name has letters of any script, digits, spaces and signs, except those that separate names
    (``/ \\ : * ? " < > | ,``). It begins with a letter, a digit, ``_`` or an opening bracket.
    """
    allowed = 0 < len(text) <= MOST_CHARACTERS and text.isprintable() and text == text.strip()
    return allowed and not FORBIDDEN.search(text) and (text[0].isalnum() or text[0] in "_([{")


def of_stem(stem: str) -> str:
    """Make a name from a file's name. Forbidden characters become spaces. Return "" if no valid name is left."""
    name = " ".join(FORBIDDEN.sub(" ", canonical(stem)).split()).lstrip("-.+ ")[:MOST_CHARACTERS].rstrip()
    return name if is_name(name) else ""


def file_stem(name: str) -> str:
    """Make a file name without suffix from a name, valid on every system.

    Different names give different file names. A plain ASCII name stays as it is; any other gets a hash at its end.
    """
    if _PLAIN.fullmatch(name) and not _RESERVED.fullmatch(name) and len(name) <= MOST_CHARACTERS:
        return name
    mark = hashlib.blake2b(canonical(name).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{readable(name)}-{mark}"


def readable(name: str) -> str:
    """Make the readable beginning of a file name from a name. Letters of any script and digits stay. Not unique."""
    stem = re.sub(r"[^\w.+-]+", "-", canonical(name)).strip("-.")
    while len(stem.encode("utf-8", "replace")) > MOST_BYTES:
        stem = stem[:-1]
    return f"_{stem}" if not stem or _RESERVED.fullmatch(stem) else stem
