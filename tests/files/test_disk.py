"""Files are written whole or not at all, and only ordinary ones are opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safelight.errors import UnreadableFileError
from safelight.files.disk import open_regular, write_whole


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    path = folder / "record"
    write_whole(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UnreadableFileError, match="no space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["record"]


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a device"])
def test_what_is_no_file_is_named(kind: str, tmp_path: Path) -> None:
    path = {"a directory": tmp_path, "a pipe": tmp_path / "pipe", "a device": Path("/dev/null")}[kind]
    if kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(UnreadableFileError, match=kind):
        open_regular(path)
