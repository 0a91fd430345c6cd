"""Finds the preview picture of a model or adapter: the one that a user chose, or one that lies beside its file.

- ``NAME.preview.png`` (or jpg, jpeg, webp): AUTOMATIC1111, Forge, Safelight's downloads
- ``NAME.png``: the same programs, ComfyUI's managers
- ``NAME.thumb.jpg``: SD.Next
- ``NAME.swarm.jpg``: SwarmUI
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image as PILImage

from safelight.catalog import chosen_previews
from safelight.catalog.cards import Card
from safelight.catalog.index_file import Stamp, stamp_of
from safelight.files.disk import write_whole
from safelight.pictures.opening import opened

MIDDLES = (".preview", "", ".thumb", ".swarm")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

SIDE = 384
"""The longer side of a preview, in pixels."""


def find(card: Card, root: Path) -> Path | None:
    """Return the file of a model's or adapter's preview; None if there is none. ``root``: that of its library."""
    chosen = _chosen(card, root)
    if chosen.is_file():
        return chosen
    path = card.path
    beside = (path.with_name(f"{path.stem}{middle}{ending}") for middle in MIDDLES for ending in ENDINGS)
    with contextlib.suppress(OSError, ValueError):
        return next((one for one in beside if one.is_file()), None)
    return None


def choose(card: Card, root: Path, picture: Path | None) -> None:
    """Set the preview of a model or adapter. None: that beside its file, if there is one.

    Raises UnreadableFileError, CorruptFileError if the picture cannot be read.
    """
    if picture is None:
        _chosen(card, root).unlink(missing_ok=True)
    else:
        write_whole(_chosen(card, root), _small(picture))


def tag(path: Path) -> str:
    """Return a text that is another one as soon as the file changes, as an HTTP header has it."""
    return f'"{hashlib.blake2b(f"{path} {stamp_of(path)}".encode("utf-8", "replace"), digest_size=12).hexdigest()}"'


def webp(path: Path) -> bytes:
    """Return a preview as a small WebP file. Raises UnreadableFileError, CorruptFileError."""
    return _of_stamp(path, stamp_of(path))


def _chosen(card: Card, root: Path) -> Path:
    return chosen_previews.place(root, "model" if card.kind == "checkpoint" else "adapter", card.name)


@lru_cache(maxsize=1024)
def _of_stamp(path: Path, stamp: Stamp | None) -> bytes:
    """Return a preview. ``stamp``: the file's, so that a file which has changed is read again."""
    del stamp
    return _small(path)


def _small(path: Path) -> bytes:
    with opened(path, ("PNG", "JPEG", "WEBP")) as picture:
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE), PILImage.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=85)
    return out.getvalue()
