"""Jobs and images are kept whole: each job ends once, and no image is noted for a job that does not run."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.jobs import made_up

from safelight.errors import CorruptFileError, StorageError, UnreadableFileError
from safelight.queue.database import Database, recover
from safelight.queue.database_file import FILE
from safelight.queue.job import QueuedJob
from safelight.queue.stored_image import StoredImage
from safelight.request.schema import Request


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path)


def ask(**more) -> Request:
    return Request(**{"prompt": "x", "model": "m", **more})


def queued(database: Database, request: Request, digest: str, **more) -> QueuedJob:
    (job,) = database.accept(made_up(request, digest), **more)
    return job


def image(job: str, place: int = 0) -> StoredImage:
    return StoredImage(
        f"{job}-{place}", job, place, f"{job}-{place}.png", 8, 8, 0, "m", "d", "s", 1.0 + place, {"a": 1}
    )


def test_a_job_goes_from_queued_to_running_to_done_once(database: Database) -> None:
    job = queued(database, ask(seed=3), "digest", client="someone", priority=2)
    assert database.job(job.id) == job
    assert (job.request.seed, job.state, job.priority, job.client) == (3, "queued", 2, "someone")
    started = database.start(job.id, "it has waited longest")
    assert started is not None
    assert (started.state, started.attempts) == ("running", 1)
    assert database.start(job.id, "again") is None
    assert database.end(job.id, "done")
    assert not database.end(job.id, "failed", "late")
    assert database.counts() == {"done": 1}
    assert database.job("nobody") is None


def test_a_slot_leaves_a_job_that_another_slot_has(database: Database) -> None:
    """The database may not confirm that a job was put back, and then another slot takes it."""
    job = queued(database, ask(), "d")
    database.start(job.id, "", "one")
    assert database.put_back(job.id, "a full disk", slot="one")
    database.start(job.id, "", "two")
    assert database.put_back(job.id, "a full disk", slot="one") is None
    assert database.end(job.id, "done", slot="one") is None
    assert database.end(job.id, "done", slot="two") is not None


def test_who_is_overtaken_and_delayed_is_counted(database: Database) -> None:
    first, second, third = (queued(database, ask(), "d") for _ in range(3))
    database.start(second.id, "")
    assert database.put_back(second.id, "its worker died", seconds=2.5)
    assert [(w.id, w.overtaken, w.delayed) for w in database.waiting(9)] == [
        (first.id, 1, 2.5),
        (second.id, 0, 0.0),
        (third.id, 0, 0.0),
    ]
    assert not database.put_back(second.id, "twice", seconds=2.5)
    database.start(third.id, "")
    database.end(third.id, "done", seconds=1.0)
    assert [(w.id, w.overtaken, w.delayed) for w in database.waiting(9)] == [(first.id, 2, 3.5), (second.id, 1, 1.0)]


def test_images_belong_to_running_jobs(database: Database) -> None:
    job = queued(database, ask(count=2), "d")
    assert not database.add_image(image(job.id))
    database.start(job.id, "")
    assert database.add_image(image(job.id))
    assert database.add_image(image(job.id, 1))
    database.end(job.id, "cancelled")
    assert not database.add_image(image(job.id, 2))
    found = database.job(job.id)
    assert found is not None
    assert found.images == 2
    images = database.images
    assert [i.place for i in images.of_job(job.id)] == [0, 1]
    assert [i.place for i in images.page().images] == [1, 0]
    assert images.get(f"{job.id}-0") == image(job.id)
    for _ in range(2):
        images.delete([f"{job.id}-0"])
        assert images.get(f"{job.id}-0") is None
    assert images.files() == {f"{job.id}-1.png"}


def test_what_ran_when_the_server_stopped_is_tried_once_more(tmp_path: Path) -> None:
    database = Database(tmp_path)
    job = queued(database, ask(), "d")
    database.start(job.id, "")
    database.close()
    again = Database(tmp_path)
    recover(again)
    found = again.job(job.id)
    assert found is not None
    assert (found.state, found.attempts) == ("queued", 1)
    again.start(job.id, "")
    recover(again)
    found = again.job(job.id)
    assert found is not None
    assert found.state == "failed"
    assert "stopped 2 times" in found.reason


def test_many_threads_write_at_once(database: Database) -> None:
    def work() -> None:
        for _ in range(20):
            job = queued(database, ask(), "d")
            assert database.start(job.id, "") is not None
            assert database.end(job.id, "done")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.counts() == {"done": 160}
    assert sorted(job.number for job in database.jobs(limit=200)) == list(range(1, 161))


@pytest.mark.sqlite
def test_a_newer_database_is_refused_with_its_version(tmp_path: Path) -> None:
    Database(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UnreadableFileError, match=r"newer Safelight \(revision 9999\)"):
        Database(tmp_path)


@pytest.mark.sqlite
def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"x" * 5000)
    with pytest.raises(CorruptFileError, match="not a database"):
        Database(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UnreadableFileError, match="cannot be written"):
        Database(tmp_path / "file")


def test_of_many_that_wait_those_that_can_be_next_are_looked_at(database: Database) -> None:
    jobs = [queued(database, ask(), "d", priority=number // 4) for number in range(8)]
    assert [waiting.id for waiting in database.waiting(2)] == [jobs[n].id for n in (0, 1, 4, 5)]
    assert database.queued() == 8
    assert set(database.jobs_of([jobs[3].id, "nobody"])) == {jobs[3].id}


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ('{"prompt": "x", "model": "m", "sampler": "of tomorrow"}', "sampler='of tomorrow'"),
        ('{"prompt": "x", "model": "m", "tempo": 3}', "tempo"),
        ('{"prompt": 5}', "model"),
        ("[]", "JSON object"),
    ],
)
def test_a_request_that_cannot_be_read_is_a_job_that_says_so(
    database: Database, tmp_path: Path, stored: str, says: str
) -> None:
    good, bad = (queued(database, ask(seed=seed), "d") for seed in (1, 2))
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute(
            "UPDATE jobs SET document = json_set(document, '$.request', json(?)) WHERE id = ?", (stored, bad.id)
        )
    found = database.job(bad.id)
    assert found is not None
    assert says in found.unreadable
    assert [job.id for job in database.jobs()] == [bad.id, good.id]
    assert database.start(bad.id, "") is not None


def test_several_are_accepted_together_or_not_at_all(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        database.accept(made_up(ask(), "d"), made_up(ask(seed=2), "d"), None)  # type: ignore[arg-type]
    assert database.queued() == 0
    jobs = database.accept(made_up(ask(), "d"), made_up(ask(seed=2), "e"))
    assert [(job.request.seed, job.model_digest) for job in jobs] == [(0, "d"), (2, "e")]


@pytest.mark.sqlite
def test_a_full_disk_is_said_as_one(database: Database, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as other:
        pages = other.execute("PRAGMA page_count").fetchone()[0]
    for connection in (database.sql.engine.raw_connection(),):
        connection.cursor().execute(f"PRAGMA max_page_count = {pages}")
        connection.close()
    with pytest.raises(StorageError, match="full"):
        database.accept(*(made_up(ask(prompt="x" * 10_000), "d") for _ in range(100)))


@pytest.mark.sqlite
def test_a_database_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """Before jobs had kinds of failure, and requests a version."""
    Database(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("ALTER TABLE jobs DROP COLUMN failure")
        other.execute("ALTER TABLE jobs DROP COLUMN document")
        other.execute("ALTER TABLE jobs ADD COLUMN request JSON NOT NULL DEFAULT '{}'")
        other.execute("UPDATE alembic_version SET version_num = '0001'")
        other.execute(
            "INSERT INTO jobs (id, request, model_digest, client, created, state, priority, overtaken, delayed, "
            "attempts, images, reason) "
            "VALUES ('a', '{\"prompt\": \"x\", \"model\": \"m\"}', 'd', '', 0, 'queued', 0, 0, 0, 0, 0, '')"
        )
    opened = Database(tmp_path)
    (job,) = opened.jobs()
    assert (job.request.prompt, job.failure, job.unreadable) == ("x", "", "")


def test_inputs_are_those_that_something_names(database: Database) -> None:
    waiting = ask(image="a" * 64, mask="b" * 64, controls=({"name": "edges", "image": "c" * 64},))
    queued(database, waiting, "d")
    done = queued(database, ask(image="e" * 64), "d")
    database.start(done.id, "")
    made = replace(image(done.id), metadata={"request": {"image": "f" * 64, "mask": "", "controls": []}})
    assert database.add_image(made)
    database.end(done.id, "done")
    assert database.inputs() == {letter * 64 for letter in "abcf"}


@pytest.mark.sqlite
@pytest.mark.parametrize("document", ["{}", '{"request": {}, "version": "2"}', '{"request": 3, "version": null}'])
def test_a_document_that_is_none_is_a_job_that_says_so(database: Database, tmp_path: Path, document: str) -> None:
    bad, good = (queued(database, ask(seed=seed), "d") for seed in (1, 2))
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("UPDATE jobs SET document = ? WHERE id = ?", (document, bad.id))
    assert {job.id: bool(job.unreadable) for job in database.jobs()} == {bad.id: True, good.id: False}
    assert database.start(bad.id, "") is not None


@pytest.mark.sqlite
def test_a_migration_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    Database(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as other:
        # After the first step of the migration: the new column is there, and nothing else was done.
        other.execute("ALTER TABLE jobs ADD COLUMN request JSON NOT NULL DEFAULT '{}'")
        other.execute("ALTER TABLE jobs ADD COLUMN version INTEGER NOT NULL DEFAULT 1")
        other.execute("UPDATE alembic_version SET version_num = '0003'")
        other.execute(
            "INSERT INTO jobs (id, request, model_digest, client, created, state, priority, overtaken, delayed, "
            "attempts, images, reason, failure, document) VALUES "
            "('a', '{\"prompt\": \"x\", \"model\": \"m\"}', 'd', '', 0, 'queued', 0, 0, 0, 0, 0, '', '', '{}')"
        )
    (job,) = Database(tmp_path).jobs()
    assert (job.request.prompt, job.unreadable) == ("x", "")
