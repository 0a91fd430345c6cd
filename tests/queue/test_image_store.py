"""Images belong to the person who has the job when they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.jobs import made_up

from safelight.file_patterns import DEFAULT
from safelight.queue.database import Database
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery
from safelight.queue.image_store import ImageStore
from safelight.queue.person import Person
from safelight.request.schema import Request


def test_an_image_of_a_removed_person_is_announced_to_the_heir(tmp_path: Path, shared_engine: Any) -> None:
    database = Database(tmp_path)
    for name in ("ann", "bob"):
        database.people.add(Person(name, "admin"), "hash")
    [job] = database.accept(made_up(Request("x", "m"), "d"), person="ann")
    running = database.start(job.id, "")
    assert running is not None
    database.people.remove("ann", heir="bob")
    events, heard = Events(), list[Event]()
    events.subscribe(heard.append)
    store = ImageStore(database, Gallery(tmp_path, DEFAULT), events)
    [image] = shared_engine.generate(Request("red apple", "starter-noto", width=64, height=64, steps=1))
    store.add(running, 0, image)
    [stored] = database.images.of_job(job.id)
    assert stored.person == "bob"
    assert [(event.kind, event.person, event.data["person"]) for event in heard] == [("image", "bob", "bob")]
    database.close()
