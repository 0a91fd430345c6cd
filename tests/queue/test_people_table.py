"""The people of a database: roles, heirs, what the first one gets, and a migration from before there were people."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
from support.jobs import made_up

from safelight.errors import InputError
from safelight.queue.database import Database
from safelight.queue.person import Person
from safelight.queue.stored_image import ImageChange, ImageFilter, StoredImage
from safelight.request.schema import Request


@pytest.fixture
def database(tmp_path: Path) -> Generator[Database]:
    made = Database(tmp_path)
    yield made
    made.close()


def image(number: int, person: str, **more: object) -> StoredImage:
    values = {"person": person, "imported": True, "bytes": 100, **more}
    base = (f"{number:032x}", "", 0, f"/pictures/{number}.png", 8, 8, number, "m", "", "", float(number), {})
    return StoredImage(*base, **values)  # pyright: ignore[reportArgumentType]


def test_the_first_person_gets_everything(database: Database) -> None:
    database.images.add_imported([image(1, "")])
    board = database.boards.add("old")
    database.presets.store("p", {"steps": 3})
    [job] = database.accept(made_up(Request("x", "m"), "d"))
    with pytest.raises(InputError, match="must be an administrator"):
        database.people.add(Person("bob", "member"), "hash")
    database.people.add(Person("ann"), "hash")
    database.people.add(Person("bob", "member"), "hash")
    assert [one.person for one in database.images.get_all([f"{1:032x}"])] == ["ann"]
    assert [(one.id, one.person) for one in database.boards.all()] == [(board.id, "ann")]
    found = database.job(job.id)
    assert found is not None
    assert found.person == "ann"
    assert database.presets.of(Person("ann")).all() == {"p": {"steps": 3}}
    assert database.presets.of(Person("bob")).all() == {}


def test_a_change_shows_at_once_and_that_of_another_process_after_a_second(tmp_path: Path, database: Database) -> None:
    assert not database.people.any()
    assert database.people.known_any is False
    other = Database(tmp_path)
    other.people.add(Person("ann"), "hash")
    other.close()
    time.sleep(1.1)
    assert database.people.any()
    assert database.people.remove("ann") is not None
    assert not database.people.any()
    database.people.add(Person("bob"), "hash")
    assert database.people.any()


def test_an_heir_gets_images_and_boards_and_waiting_jobs_end(database: Database) -> None:
    for name, role in (("ann", "admin"), ("bob", "member"), ("cat", "member")):
        database.people.add(Person(name, role), "hash")  # pyright: ignore[reportArgumentType]
    bob, cat = Person("bob", "member"), Person("cat", "member")
    database.boards.seen_by(cat).add("trips")
    board = database.boards.seen_by(bob).add("trips")
    database.images.add_imported([image(1, "bob", board=board.id)])
    [job] = database.accept(made_up(Request("x", "m"), "d"), person="bob")
    database.people.add_key("bob", "script", "a key")
    database.people.open_session("bob", "a token", 60)
    with pytest.raises(InputError, match="there is no person 'eve'"):
        database.people.remove("bob", "eve")
    assert database.people.of_key("a key") == database.people.get("bob")
    assert database.people.remove("bob", "cat") is not None
    assert database.people.of_key("a key") is None
    assert database.people.of_session("a token") is None
    assert sorted(one.name for one in database.boards.seen_by(cat).all()) == ["trips", "trips (2)"]
    [kept] = database.images.seen_by(cat).page(ImageFilter(board=board.id)).images
    assert kept.person == "cat"
    found = database.job(job.id)
    assert found is not None
    assert (found.state, found.reason, found.person) == ("cancelled", "bob was removed", "cat")
    assert database.people.remove("bob") is None


def test_somebody_is_always_an_administrator(database: Database) -> None:
    database.people.add(Person("ann"), "hash")
    database.people.add(Person("bob", "guest"), "hash")
    for attempt in (lambda: database.people.change("ann", role="member"), lambda: database.people.remove("ann")):
        with pytest.raises(InputError, match="only administrator"):
            attempt()
    database.people.change("bob", role="admin")
    assert database.people.remove("ann") is not None
    assert database.people.remove("bob") is not None, "the last person may go: then the server knows no people"
    assert not database.people.any()


def test_sessions_expire(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.people.add(Person("ann"), "hash")
    database.people.open_session("ann", "a token", 60)
    assert database.people.of_session("a token") is not None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert database.people.of_session("a token") is None


def test_what_others_share_is_seen_and_not_changed(database: Database) -> None:
    for name, role in (("ann", "admin"), ("bob", "member"), ("cat", "guest")):
        database.people.add(Person(name, role), "hash")  # pyright: ignore[reportArgumentType]
    bob, cat = Person("bob", "member"), Person("cat", "guest")
    board = database.boards.seen_by(bob).add("shown")
    images = [image(1, "bob", board=board.id, tags=("t",), loras=("l",)), image(2, "bob"), image(3, "cat")]
    database.images.add_imported(images)
    ids = [one.id for one in images]
    seen = database.images.seen_by(cat)
    assert seen.ids(ImageFilter()) == [ids[2]]
    assert dict(seen.facets().tags) == {}
    database.boards.seen_by(bob).change(board.id, shared=True)
    assert seen.ids(ImageFilter()) == [ids[2], ids[0]]
    assert seen.count(ImageFilter(person="cat")) == 1
    assert (dict(seen.facets().tags), dict(seen.facets().models)) == ({"t": 1}, {"m": 2})
    assert seen.change(ids, ImageChange(starred=True)) == [ids[2]]
    assert [one.id for one in seen.own(ids)] == [ids[2]]
    seen.delete(ids)
    assert len(database.images.get_all(ids)) == 2
    assert database.boards.seen_by(cat).change(board.id, name="mine") is None
    assert not database.boards.seen_by(cat).delete(board.id)
    assert database.images.bytes_of("bob") == 200


@pytest.mark.sqlite
def test_state_12_a_database_from_before_people_keeps_everything(tmp_path: Path) -> None:
    """Also if the migration is interrupted after any of its statements."""
    database = Database(tmp_path)
    database.images.add_imported([image(1, "")])
    board = database.boards.add("old")
    database.images.change([f"{1:032x}"], ImageChange(board=board.id))
    database.presets.store("p", {"steps": 3})
    database.close()
    downgrade(tmp_path / "safelight.db")
    shutil.copy(tmp_path / "safelight.db", tmp_path / "before.db")
    for stop_after in (None, "boards_new", "presets_new", "people"):
        for leftover in tmp_path.glob("safelight.db*"):
            leftover.unlink()
        shutil.copy(tmp_path / "before.db", tmp_path / "safelight.db")
        if stop_after:
            with closing(sqlite3.connect(tmp_path / "safelight.db")) as connection, connection:
                connection.execute(f"CREATE TABLE {stop_after} (id TEXT)")
        database = Database(tmp_path)
        assert [(one.person, one.board) for one in database.images.get_all([f"{1:032x}"])] == [("", board.id)]
        assert [(one.name, one.person, one.shared) for one in database.boards.all()] == [("old", "", False)]
        assert database.presets.all() == {"p": {"steps": 3}}
        assert not database.people.any()
        database.boards.add("new")
        database.close()


def downgrade(path: Path) -> None:
    """Make the file one of revision 0006."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in (
            "CREATE TABLE b (id VARCHAR PRIMARY KEY, name VARCHAR NOT NULL UNIQUE, created FLOAT NOT NULL)",
            "INSERT INTO b SELECT id, name, created FROM boards",
            "DROP TABLE boards",
            "ALTER TABLE b RENAME TO boards",
            "CREATE TABLE p (name VARCHAR PRIMARY KEY, fields JSON NOT NULL)",
            "INSERT INTO p SELECT name, fields FROM presets",
            "DROP TABLE presets",
            "ALTER TABLE p RENAME TO presets",
            "DROP INDEX images_by_person",
            "ALTER TABLE images DROP COLUMN person",
            "ALTER TABLE images DROP COLUMN bytes",
            *(f"DROP TABLE {name}" for name in ("person_keys", "person_sessions", "people", "audit", "input_owners")),
            "UPDATE alembic_version SET version_num = '0006'",
        ):
            connection.execute(statement)
