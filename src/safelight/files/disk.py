"""Opens regular files only, and writes files atomically."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from safelight.errors import CorruptFileError, StorageError, UnreadableFileError


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading. Return (file descriptor, size in bytes).

    Opens without blocking, so that a pipe in place of a model cannot hang the caller.
    Raises UnreadableFileError, with the reason, for anything that is not a readable regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UnreadableFileError(path, _why_unreadable(path, error)) from error
    except ValueError as error:
        raise UnreadableFileError(path, "is not a path: it contains a NUL character") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnreadableFileError(path, f"is {_kind(status.st_mode)}, not a file")
    return descriptor, status.st_size


def read_file(path: Path, most: int | None = None) -> bytes:
    """Read a small file whole. Raises UnreadableFileError, and CorruptFileError for more than ``most`` bytes."""
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        if most is not None and size > most:
            raise CorruptFileError(path, f"has {size} bytes; at most {most} are read")
        return file.read()


def read_exactly(descriptor: int, path: Path, name: str, offset: int, nbytes: int) -> bytes:
    """Read ``nbytes`` bytes at ``offset``. Raises CorruptFileError, naming the tensor, if the file is too short."""
    data = os.pread(descriptor, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(descriptor, nbytes - len(data), offset + len(data))
        if not more:
            raise CorruptFileError(path, f"ends within tensor {name}; it was cut off")
        data += more
    return data


def _why_unreadable(path: Path, error: OSError) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "is a symbolic link to a file that does not exist"
    reasons = {
        errno.ENOENT: "does not exist",
        errno.EACCES: "cannot be read: this user has no permission",
        errno.EPERM: "cannot be read: this user has no permission",
        errno.ELOOP: "is a symbolic link to itself",
        errno.ENXIO: "is a socket or device, not a file",
        errno.ENAMETOOLONG: "has a name that is too long",
    }
    return reasons.get(error.errno or 0, f"cannot be opened: {error.strerror}")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")


@contextlib.contextmanager
def temporary_file_in(folder: Path) -> Generator[tuple[BinaryIO, Path]]:
    """Open a temporary file in ``folder``. Yield (file to write into, its temporary path).

    Creates the folder if needed. The caller writes all bytes to the disk with :func:`flush_to_disk`, and then, still
    within the context, gives the file its name (:func:`os.replace`, :func:`os.link`). At its end the context deletes
    the temporary file if it was not renamed.
    Raises UnreadableFileError when the folder cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UnreadableFileError(folder, "is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".safelight-")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file, temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


def unwritable(path: Path, error: OSError) -> UnreadableFileError:
    """Return the error for a path that cannot be written: StorageError if the disk is the cause."""
    kind = StorageError if error.errno in NO_ROOM else UnreadableFileError
    return kind(path, f"cannot be written: {error.strerror or error}")


def flush_to_disk(file: BinaryIO, temporary: Path, mode: int = 0o644, *, wait: bool = True) -> None:
    """Write all bytes of a file of :func:`temporary_file_in` to the disk, and set its ``mode``.

    With the default mode other users may read the file. A file with a secret needs another mode.
    ``wait``: until the disk has the bytes. Without it, a loss of power may leave an empty file.
    """
    file.flush()
    if wait:
        os.fsync(file.fileno())
    os.chmod(temporary, mode)


def write_whole(path: Path, data: bytes, mode: int = 0o644, *, wait: bool = True) -> None:
    """Write ``data`` to ``path`` atomically. Replaces an existing file. Raises UnreadableFileError.

    ``mode``, ``wait``: see :func:`flush_to_disk`.
    """
    with temporary_file_in(path.parent) as (file, temporary):
        file.write(data)
        flush_to_disk(file, temporary, mode, wait=wait)
        os.replace(temporary, path)


def write_new(folder: Path, stem: str, ending: str, data: bytes) -> Path:
    """Write ``data`` atomically into a new file of a folder, and return its path. Never replaces an existing file.

    The name is ``STEM`` + ``ENDING``, or has the first free number (``STEM-2.png``).
    Raises UnreadableFileError.
    """
    with temporary_file_in(folder) as (file, temporary):
        file.write(data)
        flush_to_disk(file, temporary)
        return _placed(temporary, folder, stem, ending)


def place_new(temporary: Path, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError if there is a file of that name; that one stays."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A link cannot replace a file that appears meanwhile, but some file systems have no links.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        temporary.rename(path)


def _placed(temporary: Path, folder: Path, stem: str, ending: str) -> Path:
    """Give the finished file the first free name."""
    for name in numbered_names(stem, ending):
        with contextlib.suppress(FileExistsError):
            place_new(temporary, folder / name)
            return folder / name
    raise AssertionError


def numbered_names(stem: str, ending: str) -> Iterator[str]:
    """Yield ``STEM`` + ``ENDING``, then the same with the numbers from 2 (``STEM-2.png``)."""
    yield f"{stem}{ending}"
    for number in itertools.count(2):
        yield f"{stem}-{number}{ending}"
