"""Writes images into a ZIP archive, which is sent while it is written."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Generator, Iterable
from dataclasses import asdict
from pathlib import PurePosixPath

from safelight.files.disk import numbered_names
from safelight.queue.image_files import Gallery
from safelight.queue.stored_image import StoredImage

LIST = "images.json"
"""The file of the archive with the metadata of all images."""

CHUNK = 1 << 20


class _Sent(io.RawIOBase):
    """Holds the bytes that were written until they are taken. It cannot seek, so the archive is written in order."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._written += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def export(images: Iterable[StoredImage], gallery: Gallery) -> Generator[bytes]:
    """Yield a ZIP archive of the images' files, with their metadata in :data:`LIST`.

    A file that is gone is left out; the list says so.
    """
    sent, listed, names = _Sent(), list[dict[str, object]](), {LIST}
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_STORED) as archive:
        for image in images:
            path, name = gallery.path(image), _free_name(image, names)
            entry: dict[str, object] = {**asdict(image), "file": name}
            listed.append(entry)
            try:
                with (
                    path.open("rb") as source,
                    archive.open(zipfile.ZipInfo.from_file(path, name, strict_timestamps=False), "w") as target,
                ):
                    while chunk := source.read(CHUNK):
                        target.write(chunk)
                        yield sent.take()
            except OSError as error:
                entry |= {"file": None, "problem": f"{path}: {error.strerror or error}"}
        archive.writestr(LIST, json.dumps(listed, ensure_ascii=False, indent=1))
    yield sent.take()


def _free_name(image: StoredImage, names: set[str]) -> str:
    """Return a name in the archive that no other file has."""
    asked = PurePosixPath(image.file.replace("\\", "/"))
    asked = PurePosixPath("imported", asked.name) if image.imported else asked
    numbered = (str(asked.with_name(name)) for name in numbered_names(asked.stem, asked.suffix))
    free = next(name for name in numbered if name not in names)
    names.add(free)
    return free
