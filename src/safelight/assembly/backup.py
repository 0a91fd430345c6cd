"""Writes what a root has into one file, and restores it. Models stay where they are: the records name their files.

A backup is a zip file with :data:`MANIFEST`, which names each file in it with its digest. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
import zipfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from blake3 import blake3

from safelight.catalog.describe import OnBytes
from safelight.errors import CorruptFileError, InputError, StorageError
from safelight.files.disk import flush_to_disk, place_new, temporary_file_in, unwritable
from safelight.queue.copying import copy_database
from safelight.queue.database_file import FILE as DATABASE
from safelight.queue.database_file import open_file
from safelight.queue.database_server import open_server
from safelight.settings import Settings
from safelight.version import VERSION

MANIFEST = "safelight-backup.json"

RECORDS = (
    *("models", "adapters", "canaries", "wildcards", "quarantine", "seen", "previews"),
    *("safelight.yaml", "repairs.json", "file_hashes.json", "unread.json"),
)
"""What every backup has besides the database. Measurements of the machine are left out: another one measures again."""

PICTURES = ("images", "thumbnails", "inputs")
"""What a backup with pictures has, too."""

CHUNK = 1 << 20

SECRET = 0o600
"""The mode of a backup and of restored settings: they may have a key, or the password of a database."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What was written or restored. ``nbytes``: of the files before they were compressed."""

    path: Path
    files: int
    nbytes: int
    pictures: bool


def write(settings: Settings, path: Path, pictures: bool, progress: OnBytes = lambda _done, _all: None) -> Backup:
    """Write a backup of a root into the new file ``path``, completely or not at all. A server may use the root.

    The database is written as a SQLite file, also if it is PostgreSQL's.
    ``pictures``: also images and input images.
    ``progress``: called with the bytes so far, and all bytes.

    Raises:
        InputError: ``path`` exists, or the root has nothing.
        UnreadableFileError: a file or database cannot be read, or ``path`` not be written.
    """
    root = settings.root
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; choose another file")
    with tempfile.TemporaryDirectory(prefix="safelight-backup-") as folder:
        # A server may remove and make images during the backup. Each row of the copied database must have its file. So
        # the files are copied before the database, and new files after it.
        copy, names = Path(folder) / DATABASE, (*RECORDS, *(PICTURES if pictures else ()))
        files = list(_files(root, names))
        if not files and not (root / DATABASE).exists() and settings.database_url is None:
            raise InputError(f"{root} has nothing to back up")
        total = sum(map(_size, files))
        done, manifest = 0, dict[str, dict[str, Any]]()
        try:
            with temporary_file_in(path.parent) as (file, temporary):
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for one in files:
                        name = one.relative_to(root).as_posix()
                        with contextlib.suppress(FileNotFoundError):
                            manifest[name] = _add(archive, one, name)
                            done += manifest[name]["bytes"]
                            progress(done, total)
                    if _copy_database(settings, copy):
                        manifest[DATABASE] = _add(archive, copy, DATABASE)
                    for one in _files(root, names):
                        name = one.relative_to(root).as_posix()
                        if name not in manifest:
                            with contextlib.suppress(FileNotFoundError):
                                manifest[name] = _add(archive, one, name)
                    about = {"version": VERSION, "made": time.time(), "pictures": pictures, "files": manifest}
                    archive.writestr(MANIFEST, json.dumps(about, indent=1, sort_keys=True))
                flush_to_disk(file, temporary, SECRET)
                place_new(temporary, path)
        except FileExistsError as error:
            raise InputError(f"{path} was made by another program meanwhile; choose another file") from error
        except OSError as error:
            raise unwritable(Path(error.filename or path), error) from error
    return Backup(path, len(manifest), sum(one["bytes"] for one in manifest.values()), pictures)


def restore(path: Path, settings: Settings, progress: OnBytes = lambda _done, _all: None) -> Backup:
    """Restore a backup into a root that has no data yet, completely or not at all. Each file is verified.

    If the settings name a database of PostgreSQL, the jobs and images go there; it must be empty.

    Raises:
        InputError: the root or the database has data, or the file is no backup.
        CorruptFileError: a file in the backup is damaged.
        StorageError: there is no room.
    """
    root = settings.root
    taken = next((name for name in (DATABASE, *RECORDS, *PICTURES) if (root / name).exists()), None)
    if taken is not None:
        raise InputError(f"{root} has data already ({taken}); restore into an empty folder with --root")
    root.mkdir(parents=True, exist_ok=True)
    with _opened(path) as (archive, about):
        files = about["files"]
        total = sum(one["bytes"] for one in files.values())
        if shutil.disk_usage(root).free < total:
            raise StorageError(root, f"has no room for {total / 1e9:.2f} GB")
        staged = Path(tempfile.mkdtemp(prefix=".restoring-", dir=root))
        try:
            done = 0
            for name, one in files.items():
                _extract(path, archive, name, one, staged)
                done += one["bytes"]
                progress(done, total)
            _fill_server(settings, staged)
            for entry in sorted(staged.iterdir()):
                entry.rename(root / entry.name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return Backup(path, len(files), total, bool(about["pictures"]))


def _files(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        place = root / name
        if place.is_file():
            yield place
        elif place.is_dir():
            found = (one for one in place.rglob("*") if not one.name.startswith(".safelight-"))
            yield from sorted(one for one in found if one.is_file() and not one.is_symlink())


def _size(file: Path) -> int:
    """Return the size of a file in bytes; 0 if it was removed meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> dict[str, Any]:
    digest, nbytes = blake3(), 0
    entry = zipfile.ZipInfo.from_file(file, name, strict_timestamps=False)
    with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            nbytes += len(chunk)
            target.write(chunk)
    return {"blake3": digest.hexdigest(), "bytes": nbytes}


def _fill_server(settings: Settings, staged: Path) -> None:
    """Move the rows of a restored SQLite file into the database of the settings, if they name one."""
    if settings.plain_database_url is None or not (staged / DATABASE).exists():
        return
    with (
        contextlib.closing(open_file(staged)) as there,
        contextlib.closing(open_server(settings.plain_database_url)) as here,
    ):
        copy_database(there, here)
    for file in staged.glob(f"{DATABASE}*"):
        file.unlink()


def _copy_database(settings: Settings, target: Path) -> bool:
    """Copy a database as of one moment, even while a server writes to it. Returns whether there is one."""
    source = settings.root / DATABASE
    if settings.plain_database_url is not None:
        with (
            contextlib.closing(open_server(settings.plain_database_url, migrate=False)) as there,
            contextlib.closing(open_file(target.parent)) as here,
        ):
            copy_database(there, here)
        return True
    if not source.exists():
        return False
    with contextlib.closing(sqlite3.connect(source)) as there, contextlib.closing(sqlite3.connect(target)) as here:
        there.backup(here)
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Generator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            about: Any = json.loads(archive.read(MANIFEST))
            yield archive, cast("dict[str, Any]", about)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (KeyError, zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path} is no backup of Safelight, or only a part of one") from error


def _extract(path: Path, archive: zipfile.ZipFile, name: str, expected: dict[str, Any], staged: Path) -> None:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or place.parts[0] not in (DATABASE, *RECORDS, *PICTURES):
        raise CorruptFileError(path, f"has a file with the name {name!r}, which no backup has")
    target = staged / place
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = blake3()
    try:
        with archive.open(name) as source, target.open("wb") as out:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise CorruptFileError(path, f"is damaged: {name} cannot be read ({error})") from error
    if name == "safelight.yaml":
        target.chmod(SECRET)
    if digest.hexdigest() != expected["blake3"]:
        raise CorruptFileError(path, f"is damaged: {name} has other bytes than were written")
