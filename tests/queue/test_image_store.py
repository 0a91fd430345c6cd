"""Images belong to the person who has the job when they are stored, and each row has its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.jobs import made_up

from safelight.errors import StorageError
from safelight.file_patterns import DEFAULT
from safelight.queue.database import Database
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery
from safelight.queue.image_store import ImageStore
from safelight.queue.job import QueuedJob
from safelight.queue.person import Person
from safelight.queue.stored_image import StoredImage
from safelight.request.schema import Request


@pytest.fixture
def image(shared_engine: Any) -> Any:
    return next(shared_engine.generate(Request("red apple", "starter-noto", width=64, height=64, steps=1)))


@pytest.fixture
def database(tmp_path: Path) -> Any:
    opened = Database(tmp_path)
    yield opened
    opened.close()


def running_job(database: Database, person: str = "") -> QueuedJob:
    [job] = database.accept(made_up(Request("x", "m"), "d"), person=person)
    running = database.start(job.id, "")
    assert running is not None
    return running


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.rglob("*") if path.suffix in (".png", ".webp"))


def test_an_image_of_a_removed_person_is_announced_to_the_heir(database: Database, tmp_path: Path, image: Any) -> None:
    for name in ("ann", "bob"):
        database.people.add(Person(name, "admin"), "hash")
    job = running_job(database, "ann")
    database.people.remove("ann", heir="bob")
    events, heard = Events(), list[Event]()
    events.subscribe(heard.append)
    store = ImageStore(database, Gallery(tmp_path, DEFAULT), events)
    store.add(job, 0, image)
    [stored] = database.images.of_job(job.id)
    assert stored.person == "bob"
    assert [(event.kind, event.person, event.data["person"]) for event in heard] == [("image", "bob", "bob")]


@pytest.mark.parametrize("written", [True, False])
def test_a_row_that_the_database_did_not_confirm_keeps_its_file(
    written: bool, database: Database, tmp_path: Path, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, add = running_job(database), database.add_image

    def add_without_an_answer(one: StoredImage) -> None:
        if written:
            add(one)
        raise StorageError(tmp_path, "the connection was lost")

    monkeypatch.setattr(database, "add_image", add_without_an_answer)
    store = ImageStore(database, Gallery(tmp_path, DEFAULT), Events())
    with pytest.raises(StorageError):
        store.add(job, 0, image)
    assert len(database.images.of_job(job.id)) == int(written)
    assert files(tmp_path) == ([".png", ".webp"] if written else [])
    # The next start finds nothing to do.
    assert Gallery(tmp_path, DEFAULT).sweep(set()) == 0


def test_two_deletions_of_an_image_remove_no_later_file_of_its_name(
    database: Database, tmp_path: Path, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, gallery = running_job(database), Gallery(tmp_path, DEFAULT)
    store = ImageStore(database, gallery, Events())
    store.add(job, 0, image)
    [stored] = database.images.of_job(job.id)
    mark: Callable[[Sequence[StoredImage]], None] = gallery.mark

    def mark_late(images: Sequence[StoredImage]) -> None:
        monkeypatch.setattr(gallery, "mark", mark)
        assert store.delete([stored.id]) == [stored.id]
        gallery.path(stored).parent.mkdir(exist_ok=True)
        gallery.path(stored).write_bytes(b"a new image")
        mark(images)

    monkeypatch.setattr(gallery, "mark", mark_late)
    assert store.delete([stored.id]) == []
    assert gallery.path(stored).read_bytes() == b"a new image"
    assert Gallery(tmp_path, DEFAULT).sweep(set()) == 0
