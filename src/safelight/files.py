"""Files: opened only when they are ordinary ones, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from safelight.errors import StorageError, UnreadableFileError


def open_regular(path: Path) -> tuple[int, int]:
    """(file descriptor, size in bytes) of a regular file, opened for reading.

    Opened without blocking, so that a pipe put in a model's place cannot hang the caller.
    Raises UnreadableFileError with the reason for anything that is not a readable regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UnreadableFileError(path, _why_unreadable(path, error)) from error
    except ValueError as error:
        raise UnreadableFileError(path, "is not a path: it has a zero character") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnreadableFileError(path, f"is {_kind(status.st_mode)}, not a file")
    return descriptor, status.st_size


def _why_unreadable(path: Path, error: OSError) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "is a symbolic link that leads nowhere"
    reasons = {
        errno.ENOENT: "does not exist",
        errno.EACCES: "may not be read by this user",
        errno.EPERM: "may not be read by this user",
        errno.ELOOP: "is a symbolic link that leads back to itself",
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
def written(folder: Path) -> Generator[tuple[BinaryIO, Path]]:
    """(a file to write into, its temporary path) in ``folder``, which is made when it is not there.

    When the context ends all bytes have reached the disk, and the caller's last act within or after it gives the file
    its name (:func:`os.replace`, :func:`os.link`). A temporary file that was not renamed is removed.
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
    """What to raise for a path that cannot be written: StorageError where that is the disk's fault."""
    kind = StorageError if error.errno in NO_ROOM else UnreadableFileError
    return kind(path, f"cannot be written: {error.strerror or error}")


def settle(file: BinaryIO, temporary: Path, mode: int = 0o644) -> None:
    """Let all bytes of a file of :func:`written` reach the disk, and give it its ``mode``: others may read it, unless
    it holds a secret."""
    file.flush()
    os.fsync(file.fileno())
    os.chmod(temporary, mode)


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` as ``path`` whole or not at all, over what is there. Raises UnreadableFileError."""
    with written(path.parent) as (file, temporary):
        file.write(data)
        settle(file, temporary, mode)
        os.replace(temporary, path)


def write_new(folder: Path, stem: str, ending: str, data: bytes) -> Path:
    """Write ``data`` whole as ``STEM.ENDING`` into a folder, or with the first free number (``STEM-2.ENDING``), over no
    other file; its path. Raises UnreadableFileError."""
    with written(folder) as (file, temporary):
        file.write(data)
        settle(file, temporary)
        return _placed(temporary, folder, stem, ending)


def _placed(temporary: Path, folder: Path, stem: str, ending: str) -> Path:
    """Give the finished file the first free name. A link does it without a race; some file systems have none."""
    number = 1
    while True:
        path = folder / (f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}")
        try:
            os.link(temporary, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:
            if not path.exists():
                return temporary.rename(path)
            number += 1
