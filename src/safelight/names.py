"""Names of models and adapters as people write them, and file names made of those."""

from __future__ import annotations

import hashlib
import re
import unicodedata

MOST_CHARACTERS = 100

FORBIDDEN = re.compile(r'[/\\:*?"<>|,\x00-\x1f\x7f]+')
"""Not in names: what separates names in prompts, options and paths."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*[A-Za-z0-9_+-]|[A-Za-z0-9]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, whatever their ending."""

MOST_BYTES = 120
"""Of the file names that are made here: file systems take 255, and endings and numbers come behind."""


def canonical(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS keeps file names in the other."""
    return unicodedata.normalize("NFC", name)


def is_name(text: str) -> bool:
    """Whether a model or adapter may be called so: letters of any script, digits, spaces and signs, but none of those
    that separate names (``/ \\ : * ? " < > | ,``); a letter, digit, ``_`` or opening bracket comes first."""
    allowed = 0 < len(text) <= MOST_CHARACTERS and text.isprintable() and text == text.strip()
    return allowed and not FORBIDDEN.search(text) and (text[0].isalnum() or text[0] in "_([{")


def of_stem(stem: str) -> str:
    """The name made of a file's: what names may not have becomes a space. "" where nothing is left."""
    made = " ".join(FORBIDDEN.sub(" ", canonical(stem)).split()).lstrip("-.+ ")[:MOST_CHARACTERS].rstrip()
    return made if is_name(made) else ""


def file_stem(name: str) -> str:
    """A file name without its ending, made of a name, which every system can keep. Equal for equal names only; what is
    plain ASCII is kept."""
    if _PLAIN.fullmatch(name) and not _RESERVED.fullmatch(name) and len(name) <= MOST_CHARACTERS:
        return name
    mark = hashlib.blake2b(canonical(name).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{readable(name)}-{mark}"


def readable(name: str) -> str:
    """The beginning of a file name, made of a name: letters of every script and digits are kept; not unique."""
    made = re.sub(r"[^\w.+-]+", "-", canonical(name)).strip("-.")
    while len(made.encode("utf-8", "replace")) > MOST_BYTES:
        made = made[:-1]
    return f"_{made}" if not made or _RESERVED.fullmatch(made) else made
