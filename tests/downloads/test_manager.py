"""Downloads of a server: in the background, cancelled, after a restart, one after the other into the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from support import hub
from support.hub import Site, served

from safelight.assembly.library import open_library
from safelight.downloads import connection, fetch, manager
from safelight.downloads.manager import Download, Downloads
from safelight.downloads.sources import RepositoryChoice
from safelight.errors import DownloadError, StorageError
from safelight.settings import Settings


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Generator[Site]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr(manager, "SECONDS_BETWEEN_EVENTS", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in (*connection.PROXIES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with served(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        yield site


Open = Callable[[], Downloads]


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(manager._log, "warning", lambda what, **_: said.append(what))
    return said


@pytest.fixture
def told() -> list[Download]:
    return []


@pytest.fixture
def open_downloads(site: Site, root: Path, told: list[Download]) -> Generator[Open]:
    opened: list[Downloads] = []

    def open_one() -> Downloads:
        library = open_library(Settings(root=root))
        opened.append(Downloads(root, root / "downloads", library, (site.host,), told.append))
        return opened[-1]

    yield open_one
    for one in opened:
        one.stop()


def wait(downloads: Downloads, identifier: str, *states: str) -> Download:
    until = time.monotonic() + 30
    while True:
        one = downloads.find(identifier)
        assert one is not None
        if one.state in states:
            return one
        assert time.monotonic() < until, one
        time.sleep(0.01)


def test_a_download_ends_in_the_library(
    open_downloads: Open, site: Site, tiny: Path, root: Path, told: list[Download]
) -> None:
    hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes()})
    downloads = open_downloads()
    begun = downloads.begin("me/tiny", RepositoryChoice(), name="mine")
    assert begun.state == "queued"
    done = wait(downloads, begun.id, "done", "failed")
    assert (done.state, done.added, done.problem) == ("done", ("mine",), "")
    assert done.done == done.total == (tiny / "a.safetensors").stat().st_size
    states = list(dict.fromkeys(one.state for one in told))
    assert states == ["queued", "running", "adding", "done"]
    assert open_library(Settings(root=root)).get("mine").path.is_relative_to(root / "downloads")
    # The record is there after a restart.
    assert open_downloads().find(begun.id) == done


def test_a_failed_download_says_why_and_keeps_nothing_in_the_library(open_downloads: Open, site: Site) -> None:
    downloads = open_downloads()
    failed = wait(downloads, downloads.begin("me/absent", RepositoryChoice()).id, "failed")
    assert "there is no repository me/absent" in failed.problem
    with pytest.raises(DownloadError, match="is no source"):
        downloads.begin("no source", RepositoryChoice())
    assert [one.id for one in downloads.all()] == [failed.id]


def test_a_cancelled_download_stops_and_goes_on_when_it_is_asked_for_again(
    open_downloads: Open, site: Site, tiny: Path
) -> None:
    data = (tiny / "a.safetensors").read_bytes()
    hub.add_repository(site, "me/tiny", {"a.safetensors": data})
    site.seconds_a_chunk = 0.01
    downloads = open_downloads()
    first = downloads.begin("me/tiny", RepositoryChoice())
    until = time.monotonic() + 20
    while (downloads.find(first.id) or first).done < 100_000:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert downloads.cancel(first.id)
    assert wait(downloads, first.id, "cancelled").added == ()
    assert not downloads.cancel(first.id)
    site.seconds_a_chunk = 0.0
    second = wait(downloads, downloads.begin("me/tiny", RepositoryChoice()).id, "done", "failed")
    assert second.state == "done"
    assert site.ranges()


def test_after_a_restart_a_download_goes_on(open_downloads: Open, site: Site, tiny: Path) -> None:
    hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes()})
    site.seconds_a_chunk = 0.01
    before = open_downloads()
    begun = before.begin("me/tiny", RepositoryChoice())
    while (before.find(begun.id) or begun).done < 100_000:
        time.sleep(0.005)
    before.stop()
    site.seconds_a_chunk = 0.0
    after = open_downloads()
    found = after.find(begun.id)
    assert found is not None
    assert found.state == "running"
    after.start()
    assert wait(after, begun.id, "done", "failed").added == ("a",)
    assert site.ranges()


def test_a_file_that_is_no_model_is_a_failure_that_names_it(open_downloads: Open, site: Site) -> None:
    hub.add_repository(site, "me/odd", {"odd.safetensors": b"\x08\0\0\0\0\0\0\0{}      "})
    downloads = open_downloads()
    failed = wait(downloads, downloads.begin("me/odd", RepositoryChoice()).id, "failed", "done")
    assert "unknown kind of model" in failed.problem


def test_old_records_are_forgotten(open_downloads: Open, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(manager, "MOST_KEPT", 2)
    downloads = open_downloads()
    for number in range(4):
        wait(downloads, downloads.begin(f"me/absent{number}", RepositoryChoice()).id, "failed")
    assert [one.source for one in downloads.all()] == ["me/absent3", "me/absent2"]
    assert len(list((root / manager.FOLDER).iterdir())) == 2


def test_a_download_that_is_cancelled_just_before_it_is_added_is_not_added(
    open_downloads: Open, site: Site, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repository(site, "me/tiny", {"a.safetensors": (tiny / "a.safetensors").read_bytes()})
    downloads = open_downloads()
    real = manager.download_all

    def then_cancel(*given: Any) -> Any:
        paths = real(*given)
        [one] = downloads.all()
        assert downloads.cancel(one.id)
        return paths

    monkeypatch.setattr(manager, "download_all", then_cancel)
    ended = wait(downloads, downloads.begin("me/tiny", RepositoryChoice()).id, "cancelled", "done", "failed")
    assert (ended.state, ended.added) == ("cancelled", ())


def test_a_download_that_cannot_be_recorded_is_refused(open_downloads: Open, root: Path) -> None:
    (root / manager.FOLDER).write_text("a file")
    downloads = open_downloads()
    with pytest.raises(StorageError, match="cannot be written"):
        downloads.begin("me/tiny", RepositoryChoice())
    assert downloads.all() == []


@pytest.mark.parametrize("changes", [b"{", b'{"id": "x"}', b'{"id": "x", "state": "odd"}'])
def test_a_damaged_record_is_left_out_and_said(
    changes: bytes, open_downloads: Open, root: Path, logs: list[str]
) -> None:
    (root / manager.FOLDER).mkdir(parents=True)
    (root / manager.FOLDER / "x.json").write_bytes(changes)
    assert open_downloads().all() == []
    assert any("record cannot be read" in one for one in logs)
