"""What is special about PostgreSQL: its schema and its searches are SQLite's, and its server may go away."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from support import postgres
from support.jobs import made_up

from safelight.errors import InputError, StorageError, UnreadableFileError
from safelight.queue.copying import copy_database
from safelight.queue.database import Database
from safelight.queue.database_file import open_file
from safelight.queue.database_server import END_OWN, WRITERS, open_server
from safelight.queue.person import Person
from safelight.queue.stored_image import ImageChange, ImageFilter, StoredImage
from safelight.queue.tables import Table
from safelight.request.schema import Request

pytestmark = postgres.needs_postgres


@pytest.fixture
def url() -> str:
    return postgres.cluster().new()


@pytest.fixture
def database(url: str, tmp_path: Path) -> Generator[Database]:
    made = Database(tmp_path, url=url)
    yield made
    made.close()


def image(number: int, prompt: str = "", **more: object) -> StoredImage:
    base = (f"{number:032x}", "", 0, f"/pictures/{number}.png", 8, 8, number, "m", "", "", float(number), {"a": 1})
    return StoredImage(*base, prompt=prompt, imported=True, **more)  # pyright: ignore[reportArgumentType]


def test_both_schemas_are_that_of_the_tables(url: str, tmp_path: Path) -> None:
    """The migrations make on SQLite what the tables declare, and on PostgreSQL the tables are made from it."""
    for opened in (open_file(tmp_path), open_server(url)):
        with contextlib.closing(opened), opened.engine.connect() as connection:
            # Numbers have the same kinds by other names, and alembic does not compare an index with an order.
            context = MigrationContext.configure(connection, opts={"compare_type": False})
            changes = [str(change) for change in compare_metadata(context, Table.metadata)]
            left_out = ("image_texts", "jobs_by_priority")
            assert [one for one in changes if not any(name in one for name in left_out)] == [], opened.place


LETTERS = "abc ABC äÄé _-.,/'\"\\:*&|!()<>0 1 猫犬 한ü ß İ ſ\t\n"


@given(
    texts=st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=6),
    search=st.text(LETTERS, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_both_find_the_same(
    texts: list[str], search: str, tmp_path_factory: pytest.TempPathFactory, both: tuple[Database, Database]
) -> None:
    images = [image(number, prompt) for number, prompt in enumerate(texts, 1)]
    found: list[list[str]] = []
    for database in both:
        database.images.delete(database.images.ids(ImageFilter()))
        database.images.add_imported(images)
        found.append(database.images.ids(ImageFilter(search=search)))
    assert found[0] == found[1], (texts, search)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Database, Database]]:
    folder = tmp_path_factory.mktemp("both")
    made = Database(folder), Database(folder, url=postgres.cluster().new())
    yield made
    for one in made:
        one.close()


def test_what_the_database_cannot_store_is_refused(database: Database) -> None:
    with pytest.raises(InputError, match="NUL"):
        database.accept(made_up(Request("a\0b", "m"), "d"))
    with pytest.raises(InputError, match="NUL"):
        database.boards.add("a\0b")
    assert database.queued() == 0
    assert database.boards.all() == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("mysql://host/name", "must begin with postgresql://"),
        ("nothing", "is not an address"),
        ("postgresql://127.0.0.1:1/nothing", "cannot be opened"),
    ],
)
def test_other_addresses_are_refused(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        Database(tmp_path, url=address)


def test_a_newer_revision_is_refused(url: str, tmp_path: Path) -> None:
    Database(tmp_path, url=url).close()
    with contextlib.closing(open_server(url)) as opened, opened.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UnreadableFileError, match="newer Safelight"):
        Database(tmp_path, url=url)


def test_a_second_server_is_refused(url: str, tmp_path: Path) -> None:
    first, second = Database(tmp_path, url=url), Database(tmp_path, url=url)
    first.claim()
    with pytest.raises(InputError, match="another Safelight server uses PostgreSQL at"):
        second.claim()
    first.close()
    second.claim()
    second.close()


def test_a_server_that_goes_away_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    cluster = postgres.Cluster()
    try:
        database = Database(tmp_path, url=cluster.new())
        [job] = database.accept(made_up(Request("x", "m"), "d"))
        assert database.start(job.id, "") is not None
        cluster.stop()
        with pytest.raises(StorageError, match="PostgreSQL at"):
            database.end(job.id, "done")
        cluster.start()
        assert database.end(job.id, "done")
        assert not database.end(job.id, "done"), "a job ends once"
        database.close()
    finally:
        cluster.close()


def test_after_a_restart_of_postgresql_only_one_server_writes(tmp_path: Path) -> None:
    cluster = postgres.Cluster()
    url = cluster.new()
    first, second = Database(tmp_path, url=url), Database(tmp_path, url=url)
    try:
        first.claim()
        cluster.stop()
        cluster.start()
        # It takes its claim again with its next write.
        [job] = first.accept(made_up(Request("x", "m"), "d"))
        with pytest.raises(InputError, match="another Safelight server uses"):
            second.claim()
        cluster.stop()
        cluster.start()
        second.claim()
        with pytest.raises(StorageError, match="another Safelight server claimed it"):
            first.accept(made_up(Request("x", "m"), "d"))
        assert second.start(job.id, "") is not None
        second.close()
        assert first.end(job.id, "done"), "the other one is gone"
    finally:
        for one in (first, second):
            one.close()
        cluster.close()


@contextlib.contextmanager
def lost(database: Database) -> Generator[None]:
    """Break the connection of a claim on this side only, as a network does. PostgreSQL sees nothing of it."""
    claim: Any = database._claim
    fd = claim._connection.connection.driver_connection.fileno()
    kept, (dead, other) = os.dup(fd), socket.socketpair()
    other.close()
    os.dup2(dead.fileno(), fd)
    try:
        yield
    finally:
        os.close(kept)
        dead.close()


def test_a_claim_whose_connection_is_lost_on_one_side_is_taken_again(
    url: str, database: Database, tmp_path: Path
) -> None:
    database.claim()
    with lost(database):
        assert database.accept(made_up(Request("x", "m"), "d"))
        other = Database(tmp_path, url=url)
        with pytest.raises(InputError, match="another Safelight server uses"):
            other.claim()
        other.close()


def test_a_write_that_waits_while_another_server_claims_the_database_is_refused(
    url: str, database: Database, tmp_path: Path
) -> None:
    other = Database(tmp_path, url=url)
    database.claim()
    claim: Any = database._claim
    with other.sql.engine.connect() as writer, ThreadPoolExecutor(1) as pool:
        writer.execute(text(f"SELECT pg_advisory_xact_lock({WRITERS})"))
        writes = pool.submit(database.accept, made_up(Request("x", "m"), "d"))
        with other.sql.engine.connect() as watch:
            while not watch.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar():
                time.sleep(0.01)
            watch.execute(text(END_OWN), claim._backend)
        other.claim()
        writer.rollback()
        with pytest.raises(StorageError, match="another Safelight server claimed it"):
            writes.result(30)
    assert other.jobs() == []
    other.close()


def test_a_closed_database_claims_nothing(url: str, tmp_path: Path) -> None:
    first, second = Database(tmp_path, url=url), Database(tmp_path, url=url)
    first.claim()
    first.close()
    with pytest.raises(StorageError, match="is closed"):
        first.accept(made_up(Request("x", "m"), "d"))
    second.claim()
    second.close()


def test_a_database_that_a_server_uses_is_not_migrated(url: str, database: Database, tmp_path: Path) -> None:
    database.claim()
    with database.sql.session() as session, session.begin():
        session.execute(text("UPDATE alembic_version SET version_num = '0006'"))
    with pytest.raises(UnreadableFileError, match="a server may be using it"):
        Database(tmp_path, url=url)
    with database.sql.session() as session:
        assert session.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0006"


def test_a_database_is_copied_there_and_back(url: str, tmp_path: Path) -> None:
    start = Database(tmp_path / "a")
    start.people.add(Person("ann"), "hash")
    board = start.boards.add("cats")
    start.images.add_imported([image(number, f"cat {number}", board=board.id) for number in range(1, 1200)])
    start.images.change([f"{5:032x}"], ImageChange(add_tags=("good",)))
    start.accept(made_up(Request("x", "m"), "d"))
    start.presets.store("p", {"steps": 3})
    start.audit.add("ann", "did", "this")
    there, back = Database(tmp_path, url=url), Database(tmp_path / "b")
    try:
        assert copy_database(start.sql, there.sql) == copy_database(there.sql, back.sql)
        for one in (there, back):
            assert one.images.ids(ImageFilter(search='cat "7"')) == [f"{7:032x}"]
            assert one.images.ids(ImageFilter(search="good")) == [f"{5:032x}"]
            assert one.images.get_all([f"{5:032x}"]) == start.images.get_all([f"{5:032x}"])
            assert one.boards.all() == start.boards.all()
            assert one.jobs() == start.jobs()
            assert one.people.all() == start.people.all()
            # New rows are numbered from behind the copied ones.
            one.images.add_imported([image(5000, "new")])
            [job] = one.accept(made_up(Request("y", "m"), "d"))
            assert job.number == 2
        with pytest.raises(InputError, match="has data already"):
            copy_database(start.sql, there.sql)
    finally:
        for one in (start, there, back):
            one.close()
