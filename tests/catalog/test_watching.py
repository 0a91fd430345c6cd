"""Watched folders: what appears is imported, what goes is forgotten, and what is half written waits."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from support import adapters

from safelight.catalog import watching
from safelight.catalog.catalog import Catalog
from safelight.catalog.watching import Changes, FolderWatcher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


def copy(source: Path, target: Path, seconds_ago: float = 100.0) -> Path:
    shutil.copy(source, target)
    at = time.time() - seconds_ago
    os.utime(target, (at, at))
    return target


def test_files_appear_and_go(root: Path, tiny: Path, folder: Path) -> None:
    catalog = Catalog.under(root)
    watcher = FolderWatcher([folder], catalog, lambda _: None)
    assert watcher.look() == Changes()
    path = copy(tiny / "a.safetensors", folder / "first.safetensors")
    (folder / "page.safetensors").write_text("<!DOCTYPE html>")
    assert watcher.look() == Changes(("first",))
    assert watcher.look() == Changes()
    lora = adapters.write(folder / "style.safetensors")
    os.utime(lora, (1, 1))
    assert watcher.look() == Changes(("style",))
    assert catalog.adapters.get("style").kind == "lora"
    path.unlink()
    assert watcher.look() == Changes((), ("first",))
    assert "first" not in [card.name for card in catalog.library.cards()]
    # It was read, so its record stays, and says that the file is gone.
    lora.unlink()
    assert watcher.look() == Changes()
    [card] = [card for card in catalog.adapters.cards() if card.name == "style"]
    assert card.state() == "gone"


def test_a_file_that_is_being_written_waits(root: Path, tiny: Path, folder: Path) -> None:
    watcher = FolderWatcher([folder], Catalog.under(root), lambda _: None)
    path = copy(tiny / "a.safetensors", folder / "first.safetensors", seconds_ago=0)
    assert watcher.look() == Changes()
    os.truncate(path, path.stat().st_size - 1)
    assert watcher.look() == Changes()
    copy(tiny / "a.safetensors", path, seconds_ago=-1000)
    assert watcher.look() == Changes()
    # A time in the future says nothing, but it is the same file as before.
    assert watcher.look() == Changes(("first",))
    # Another content under the same name keeps the name.
    copy(tiny / "xl.safetensors", path, seconds_ago=50)
    assert watcher.look() == Changes(("first",))
    [card] = [card for card in Catalog.under(root).library.cards() if card.name == "first"]
    assert card.summary["base"] == "sdxl"


@pytest.mark.parametrize("mounted", [True, False])
def test_one_of_several_disks_that_is_not_there_makes_nothing_forgotten(
    mounted: bool, root: Path, tiny: Path, folder: Path
) -> None:
    """Its folder is gone, or is empty where a disk was mounted. What the user called its models stays."""
    catalog = Catalog.under(root)
    watcher = FolderWatcher([folder], catalog, lambda _: None)
    copy(tiny / "b.safetensors", folder / "here.safetensors")
    (folder / "disk").mkdir()
    copy(tiny / "a.safetensors", folder / "disk/there.safetensors")
    assert sorted(watcher.look().added) == ["here", "there"]
    catalog.library.rename("there", "mine")
    (folder / "disk").rename(folder.parent / "away")
    if mounted:
        (folder / "disk").mkdir()
    assert watcher.look() == Changes()
    if mounted:
        (folder / "disk").rmdir()
    (folder.parent / "away").rename(folder / "disk")
    assert watcher.look() == Changes()
    assert {"here", "mine"} <= {card.name for card in catalog.library.cards()}


def test_a_disk_that_is_not_there_makes_nothing_forgotten(root: Path, tiny: Path, folder: Path) -> None:
    catalog = Catalog.under(root)
    watcher = FolderWatcher([folder], catalog, lambda _: None)
    copy(tiny / "a.safetensors", folder / "first.safetensors")
    assert watcher.look() == Changes(("first",))
    folder.rename(folder.with_name("unmounted"))
    assert watcher.look() == Changes()
    # The empty place where it was mounted.
    folder.mkdir()
    assert watcher.look() == Changes()
    folder.rmdir()
    assert "first" in [card.name for card in catalog.library.cards()]
    folder.with_name("unmounted").rename(folder)
    assert watcher.look() == Changes()


def test_a_moved_file_keeps_its_name(root: Path, tiny: Path, folder: Path) -> None:
    catalog = Catalog.under(root)
    watcher = FolderWatcher([folder], catalog, lambda _: None)
    path = copy(tiny / "a.safetensors", folder / "first.safetensors")
    watcher.look()
    catalog.library.rename("first", "mine")
    (folder / "sub").mkdir()
    path.rename(folder / "sub/other.safetensors")
    watcher.look()
    assert "mine" in [card.name for card in catalog.library.cards()]


def test_the_thread_tells_and_ends(root: Path, tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SECONDS", 0.01)
    told: list[Changes] = []
    watcher = FolderWatcher([folder], Catalog.under(root), told.append)
    watcher.start()
    copy(tiny / "a.safetensors", folder / "first.safetensors")
    until = time.monotonic() + 20
    while not told:
        assert time.monotonic() < until
        time.sleep(0.01)
    watcher.stop()
    assert told == [Changes(("first",))]
