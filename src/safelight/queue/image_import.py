"""Adds the pictures of a folder to the gallery, whichever program made them. The files stay where they are."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage

from safelight.errors import FileError, UnreadableFileError
from safelight.files.json_values import json_object
from safelight.pictures import infotext
from safelight.pictures.generation_data import GenerationData
from safelight.pictures.opening import DAMAGED
from safelight.pictures.read_generation_data import read
from safelight.queue.image_files import READ
from safelight.queue.image_table import ImageTable
from safelight.queue.stored_image import StoredImage

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif"})

AT_ONCE = 200
"""Pictures of one transaction."""

UNKNOWN = "unknown program"


@dataclass(frozen=True, slots=True)
class ImportedPicture:
    """What became of a picture.

    ``state``: ``imported``; ``known``: it is in the gallery already; ``left out``: it does not say how it was made;
    ``refused``: it cannot be read.
    ``problem``: why it was refused.
    """

    path: Path
    state: Literal["imported", "known", "left out", "refused"]
    program: str = ""
    problem: str = ""


def import_pictures(folder: Path, table: ImageTable, *, every: bool = False) -> Generator[ImportedPicture]:
    """Add the pictures in a folder and below it to the gallery, and yield what became of each.

    Only the heads of the files are read, and the pixels of Safelight's own images, so that they can be checked. A
    picture's time is that of its file.
    ``every``: also pictures that do not say how they were made.
    Raises UnreadableFileError if the folder cannot be read.
    """
    if not folder.is_dir():
        raise UnreadableFileError(folder, "is not a folder")
    pictures = _pictures(folder)
    while paths := list(islice(pictures, AT_ONCE)):
        known = table.known_files([str(path) for path in paths if _is_text(path)])
        found: list[StoredImage] = []
        done: list[ImportedPicture] = []
        for path in paths:
            if str(path) in known:
                done.append(ImportedPicture(path, "known"))
                continue
            try:
                image = _stored(path)
            except FileError as error:
                done.append(ImportedPicture(path, "refused", problem=error.problem))
                continue
            if image.program == UNKNOWN and not every:
                done.append(ImportedPicture(path, "left out"))
                continue
            found.append(image)
            done.append(ImportedPicture(path, "imported", image.program))
        table.add_imported(found)
        yield from done


def _pictures(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise UnreadableFileError(Path(error.filename or folder), f"cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder.absolute(), onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in ENDINGS and not name.startswith("."):
                yield Path(place, name)


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _stored(path: Path) -> StoredImage:
    """Return a picture as the gallery stores it. Raises FileError if it is damaged."""
    if not _is_text(path):
        # Neither the database nor JSON can hold it.
        raise UnreadableFileError(path, "has a name that is no text")
    try:
        created = path.stat().st_mtime
        with PILImage.open(path, formats=READ) as picture:
            made = read(picture) or GenerationData(UNKNOWN)
            own: dict[str, Any] = {}
            pixels = ""
            if made.program == "Safelight":
                own = json_object(infotext.read(picture)[1].get("safelight"))
                if "encoding" not in own:
                    pixels = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
            width, height = picture.size
    except DAMAGED as error:
        raise UnreadableFileError(path, f"is damaged, or no picture ({error})") from error
    model = json_object(own.get("model"))
    return StoredImage(
        id=uuid.uuid4().hex,
        job="",
        place=0,
        file=str(path),
        width=width,
        height=height,
        seed=made.seed if made.seed is not None and 0 <= made.seed < 1 << 63 else None,
        model=made.model,
        model_digest=str(model.get("digest", "")),
        pixels_sha256=pixels,
        created=created,
        metadata=own or {"generation_data": asdict(made)},
        prompt=made.prompt,
        negative=made.negative,
        loras=tuple(dict.fromkeys(lora.name for lora in made.loras if lora.name)),
        program=made.program,
        imported=True,
    )
