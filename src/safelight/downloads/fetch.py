"""Fetches one file: it goes on where an earlier attempt stopped, and is put in place only if it is right."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import httpx

from safelight.downloads.remote import RemoteFile
from safelight.errors import CorruptFileError, DownloadError, StorageError
from safelight.files.header import is_pickle, refuse_known_strangers

ATTEMPTS = 5
"""How often a download is tried again without one more byte."""

WAIT_SECONDS = 1.0
"""Before the second attempt; twice as long before each further one."""

SPARE_BYTES = 256 << 20
"""Bytes that stay free on the disk."""

BYTES_BETWEEN_CHECKS = 64 << 20
"""If the server does not say how large the file is, the disk's room is checked after as many bytes."""

MOST_OPTIONAL_BYTES = 20 << 20
"""Bytes of a file without which the download is complete, such as a preview."""

SECONDS_BETWEEN_CALLS = 0.25
"""While an attempt is waited for, the caller is asked as often whether to stop."""

PART, NOTE = ".part", ".part.json"

OnBytes = Callable[[int, int | None], None]
"""Called with the bytes that have arrived, and those of the whole file if they are known. It may raise to stop."""

_NUMBER = r"[0-9]{1,20}"
_LENGTH = re.compile(_NUMBER)
_RANGE = re.compile(rf"bytes ({_NUMBER})-({_NUMBER})/({_NUMBER}|\*)")


class _Again(Exception):
    """The attempt ended early; another may go on."""


def fetch(client: httpx.Client, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
    """Download a file.

    If ``target`` is there, with the size and the hash that the source gives, nothing is downloaded. What an earlier
    attempt left is used if the server still has the same file.
    Raises DownloadError if the server does not give the file that the source describes.
    Raises StorageError if the disk has too little room, or cannot be written.
    """
    try:
        _fetch(client, file, target, on_bytes)
    except OSError as error:
        raise StorageError(target, f"cannot be written: {error.strerror or error}") from error


def _fetch(client: httpx.Client, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
    if target.exists() and is_right(target, file):
        on_bytes(target.stat().st_size, target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    attempt = _Attempt(client, file, target, part, on_bytes)
    failures, before = 0, -1
    while True:
        try:
            attempt.run()
            break
        except httpx.TooManyRedirects as error:
            raise DownloadError(file.url, f"leads in a circle ({error})") from error
        except (_Again, httpx.TransportError) as error:
            there = part.stat().st_size if part.exists() else 0
            failures = 1 if there > before else failures + 1
            before = max(before, there)
            if failures >= ATTEMPTS:
                problem = f"ended after {there} bytes, {ATTEMPTS} times ({error or type(error).__name__})"
                raise DownloadError(file.url, f"{problem}. What has arrived is kept; try again later") from error
            until = time.monotonic() + WAIT_SECONDS * 2 ** (failures - 1)
            while (left := until - time.monotonic()) > 0:
                on_bytes(there, attempt.total)
                time.sleep(min(left, SECONDS_BETWEEN_CALLS))
    attempt.finish()


def is_right(path: Path, file: RemoteFile) -> bool:
    """Return whether a file that is already there is the one that the source describes."""
    if file.nbytes is not None and path.stat().st_size != file.nbytes:
        return False
    if file.sha256 is None:
        return file.nbytes is not None
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256


class _Attempt:
    """The attempts to download one file.

    ``part``: the file with the bytes that have arrived.
    ``total``: bytes of the whole file, None while they are unknown.
    """

    def __init__(self, client: httpx.Client, file: RemoteFile, target: Path, part: Path, on_bytes: OnBytes) -> None:
        self._client, self._file, self._target, self._part = client, file, target, part
        self._note_file = target.with_name(target.name + NOTE)
        self._on_bytes = on_bytes
        self.total = file.nbytes

    def run(self) -> None:
        """Download what is missing. Raises _Again if the connection ended before."""
        note = self._note()
        have = self._part.stat().st_size if self._part.exists() and note else 0
        headers = dict(self._file.headers)
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := note.get("validator"):
                headers["If-Range"] = validator
        with self._client.stream("GET", self._file.url, headers=headers) as response:
            have, total = self._begin(response, have, note)
            self.total = total
            self._write_note(
                {"url": self._place(), "validator": _validator(response), "sha256": self._file.sha256, "total": total}
            )
            with self._part.open("ab" if have else "wb") as out:
                self._receive(response, out, have, total)

    def _begin(self, response: httpx.Response, have: int, note: Mapping[str, Any]) -> tuple[int, int | None]:
        """Check an answer. Return how many bytes of the part are used, and the size of the whole file."""
        self._refuse(response)
        if response.status_code == 416:
            # There is no such range: the part is as long as the file, or of another file.
            self.discard()
            raise _Again("the server has a file of another size")
        total: int | None = None
        if response.status_code == 206:
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            changed = note.get("validator") and _validator(response) != note["validator"]
            if found is None or int(found[1]) != have or changed:
                self.discard()
                raise _Again("the server has another file now")
            total = note.get("total") if found[3] == "*" else int(found[3])
        else:
            have = 0
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and _LENGTH.fullmatch(length) else None
        expected = self._file.nbytes
        if expected is not None and total is not None and total != expected:
            problem = f"the server's file has {total} bytes; the source says {expected}"
            raise DownloadError(self._file.url, problem)
        whole = total if total is not None else expected
        self._check_room(have, whole)
        return have, whole

    def _refuse(self, response: httpx.Response) -> None:
        """Raise DownloadError for an answer that is no file."""
        status = response.status_code
        if status in (200, 206, 416):
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise DownloadError(self._file.url, f"the server compresses the file ({encoding}), unasked")
            return
        if status in (408, 425, 429) or status >= 500:
            raise _Again(f"the server answered {status}")
        reasons = {
            401: "needs an account or a token",
            403: "is not open to this account: accept its licence on its page, and use a token",
            404: "is not there",
            410: "is not there any more",
        }
        what = reasons.get(status, "cannot be had")
        raise DownloadError(self._file.url, f"{what} (the server answered {status})")

    def _check_room(self, have: int, whole: int | None) -> None:
        """Raise StorageError if the disk has no room for what is missing; for some bytes if that is unknown."""
        if self._file.optional and (whole or have) > MOST_OPTIONAL_BYTES:
            self.discard()
            raise DownloadError(self._file.url, f"has more than {MOST_OPTIONAL_BYTES >> 20} MB")
        missing = BYTES_BETWEEN_CHECKS if whole is None else whole - have
        free, needed = shutil.disk_usage(self._target.parent).free, missing + SPARE_BYTES
        if free < needed:
            problem = f"the disk has {free / 1e9:.1f} GB free, and the download needs {needed / 1e9:.1f} GB"
            raise StorageError(self._target, problem)

    def _receive(self, response: httpx.Response, out: BinaryIO, have: int, total: int | None) -> None:
        self._on_bytes(have, total)
        check_at = have + BYTES_BETWEEN_CHECKS
        # As it arrives: a larger chunk would be lost when the connection ends within it.
        for chunk in response.iter_raw():
            have += len(chunk)
            if total is not None and have > total:
                problem = f"the server sends more than the {total} bytes that it has said"
                raise DownloadError(self._file.url, problem)
            if total is None and (have > check_at or self._file.optional):
                self._check_room(have, None)
                check_at = have + BYTES_BETWEEN_CHECKS
            out.write(chunk)
            self._on_bytes(have, total)
        if total is not None and have < total:
            raise _Again(f"the server ended after {have} of {total} bytes")

    def finish(self) -> None:
        """Compare size and hash, refuse what is no model, and put the file in its place."""
        size = self._part.stat().st_size
        with self._part.open("rb") as opened:
            start = opened.read(64)
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest() if self._file.sha256 else ""
        try:
            refuse_known_strangers(self._target, start, size)
            _refuse_pickle(self._target, start)
        except CorruptFileError as error:
            self.discard()
            raise DownloadError(self._file.url, f"what the server sent {error.problem}") from error
        if self._file.sha256 and digest != self._file.sha256:
            self.discard()
            problem = f"has the SHA-256 {digest[:16]}…; the source says {self._file.sha256[:16]}…"
            raise DownloadError(self._file.url, f"{problem}. Nothing was kept")
        with self._part.open("rb+") as opened:
            os.fsync(opened.fileno())
        self._part.replace(self._target)
        self._note_file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the part and its note."""
        self._part.unlink(missing_ok=True)
        self._note_file.unlink(missing_ok=True)

    def _note(self) -> Mapping[str, Any]:
        """Return what is known of the part; empty if it is that of another file."""
        with contextlib.suppress(OSError, ValueError):
            found: Any = json.loads(self._note_file.read_text())
            if isinstance(found, dict):
                note = cast("dict[str, Any]", found)
                same = note.get("sha256") == self._file.sha256 and note.get("url") == self._place()
                # Without a hash or a validator, nothing says whether the server's file is still the same.
                return note if same and (note.get("validator") or self._file.sha256) else {}
        return {}

    def _place(self) -> str:
        """Return the address without its query, which may have a token that changes."""
        return self._file.url.partition("?")[0]

    def _write_note(self, note: Mapping[str, Any]) -> None:
        self._note_file.write_text(json.dumps(note))


def _validator(response: httpx.Response) -> str | None:
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def _refuse_pickle(path: Path, start: bytes) -> None:
    """Raise CorruptFileError for a pickle."""
    if is_pickle(start):
        raise CorruptFileError(
            path, "is a pickle, which can run code when other programs open it; take a safetensors file"
        )
