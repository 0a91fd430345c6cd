"""A server that knows people: an administrator, two members and a guest, each with a key."""

from __future__ import annotations

from pathlib import Path

import httpx
from support.serving import Server, database_of

from safelight.queue.database import Database
from safelight.queue.person import Person, Role
from safelight.server.passwords import hash_password

PEOPLE: dict[str, Role] = {"ada": "admin", "max": "member", "eve": "member", "gus": "guest"}

PASSWORD = "correct horse battery"


def key_of(name: str) -> str:
    """The key of a person in these tests."""
    return f"safelight-key-of-{name}"


def add_people(root: Path, *more: Person) -> None:
    """Add the people to the database of a root whose server is not running."""
    root.mkdir(exist_ok=True)
    database, hashed = Database(root, url=database_of(root)), hash_password(PASSWORD)
    try:
        for person in (*(Person(name, role) for name, role in PEOPLE.items()), *more):
            database.people.add(person, hashed)
            database.people.add_key(person.name, f"the key of {person.name}", key_of(person.name))
    finally:
        database.close()


def as_person(server: Server, name: str) -> httpx.Client:
    """A client that sends a person's key; without one for ""."""
    headers = {"Authorization": f"Bearer {key_of(name)}"} if name else {}
    return httpx.Client(base_url=server.url, headers=headers, timeout=120)
