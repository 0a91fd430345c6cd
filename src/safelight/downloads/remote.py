"""What is to be downloaded, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safelight.errors import DownloadError

MOST_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server.

    ``name``: its path within the folder of the download, with ``/``.
    ``nbytes``: its size in bytes, None if the source does not say it.
    ``sha256``: in hex, None if the source does not say it.
    ``headers``: to send to the first server; a redirect to another one does not get them.
    ``optional``: the download is complete without it.
    """

    url: str
    name: str
    nbytes: int | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of one source.

    ``title``: what people call it.
    ``folder``: the folder of the files, within that of all downloads.
    ``files``: at least one.
    ``notes``: what the source says of it: licence, trigger words.
    ``texts``: small files to write beside the others, by name.
    """

    title: str
    folder: str
    files: tuple[RemoteFile, ...]
    notes: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int | None:
        """Bytes of all files that are needed, None if the size of one is unknown."""
        sizes = [one.nbytes for one in self.files if not one.optional]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def checked_name(source: str, name: str) -> str:
    """Return a relative path that a server named, if it stays in its folder. Raises DownloadError otherwise."""
    parts = name.split("/")
    wrong = not name or name.startswith("/") or "\\" in name or not name.isprintable() or ":" in parts[0]
    if wrong or any(part in ("", ".", "..") or len(part.encode()) > MOST_NAME_BYTES for part in parts):
        raise DownloadError(source, f"the server names a file {name[:80]!r}, which is not a path within a folder")
    return name
