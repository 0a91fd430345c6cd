"""The dispatcher ends every job exactly once, whatever fails around it. A scripted worker sends each message at the
moment that a test needs."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.jobs import made_up
from support.scripted_queue import Queue, Told, died, done

from safelight.errors import QueueFullError, StorageError
from safelight.queue.events import Event
from safelight.request.results import Preview, Progress
from safelight.request.schema import Request
from safelight.server import problems
from safelight.settings_sources import load_settings
from safelight.workers import job_runner
from safelight.workers.messages import Ended, FromWorker, Generate, Progressed
from safelight.workers.supervisor import Supervisor


@pytest.fixture
def queue(tmp_path: Path) -> Generator[Queue]:
    made = Queue(tmp_path, Told())
    yield made
    made.dispatcher.stop(0)
    made.database.close()


def test_an_end_that_cannot_be_written_is_written_later(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk, the job ends when there is room again, and no other job starts before that."""
    end, fails, told = queue.database.end, [OSError("no space left"), OSError("no space left")], list[str]()

    def failing(*arguments: Any, **more: Any) -> bool:
        if fails:
            raise fails.pop()
        return end(*arguments, **more)

    def heard(event: Event) -> None:
        if event.kind == "job":
            told.append(f"{event.data['number']} {event.data['state']}")

    monkeypatch.setattr(queue.database, "end", failing)
    queue.events.subscribe(heard)
    first, second = queue.accept(), queue.accept()
    queue.dispatcher.start()
    assert queue.ended(second).state == queue.ended(first).state == "done"
    # The dispatcher writes to the database first, then sends the event.
    until = time.monotonic() + 5
    while len(told) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert told == ["1 queued", "2 queued", "1 running", "1 done", "2 running", "2 done"]


def test_a_cancel_is_kept_when_the_worker_dies_after_it(queue: Queue) -> None:
    def cancelled_and_died(wanted: Generate) -> Generator[FromWorker]:
        assert queue.dispatcher.cancel(wanted.job_id)
        yield from died(wanted)

    queue.supervisor.script = cancelled_and_died
    job = queue.accept()
    queue.dispatcher.start()
    assert queue.ended(job).state == "cancelled"
    assert queue.ended(job).attempts == 1
    assert queue.supervisor.cancelled == [job.id]


def test_a_cancel_after_the_worker_died_is_kept(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cancel comes between the worker's death and the second attempt."""
    put_back = queue.database.put_back

    def cancelled_first(job_id: str, *arguments: Any) -> bool:
        assert queue.dispatcher.cancel(job_id)
        return put_back(job_id, *arguments)

    monkeypatch.setattr(queue.database, "put_back", cancelled_first)
    queue.supervisor.script = died
    job = queue.accept()
    queue.dispatcher.start()
    assert queue.ended(job).state == "cancelled"
    assert queue.ended(job).attempts == 1


@pytest.mark.parametrize(("cancelled", "becomes"), [(True, ("cancelled", 1)), (False, ("queued", 0))])
def test_when_the_server_stops_a_job_is_put_back_unless_it_was_cancelled(
    tmp_path: Path, cancelled: bool, becomes: tuple[str, int]
) -> None:
    queue, runs, go = Queue(tmp_path, Told()), threading.Event(), threading.Event()

    def waits(wanted: Generate) -> Generator[FromWorker]:
        runs.set()
        go.wait(10)
        yield Ended(wanted.job_id, "cancelled", "", ())

    queue.supervisor.script = waits
    job = queue.accept()
    queue.dispatcher.start()
    assert runs.wait(10)
    if cancelled:
        queue.dispatcher.cancel(job.id)
    threading.Timer(0.2, go.set).start()
    queue.dispatcher.stop(0.05)
    found = queue.database.job(job.id)
    assert found is not None
    assert (found.state, found.attempts) == becomes


def test_a_job_is_cancelled_while_its_worker_still_starts(tmp_path: Path) -> None:
    # It says nothing for a minute, so it cannot be faster than the cancel.
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    supervisor = Supervisor(slow, load_settings(tmp_path), spare=False)
    queue = Queue(tmp_path, supervisor)
    job = queue.accept()
    queue.dispatcher.start()
    while not queue.dispatcher.running():
        time.sleep(0.005)
    assert supervisor.run_settings(0.0) is None
    assert queue.dispatcher.cancel(job.id)
    assert queue.ended(job).state == "cancelled"
    assert supervisor.run_settings(0.0) is None
    queue.dispatcher.stop(0)


def test_a_worker_gets_the_models_of_the_next_jobs_and_the_queue_is_queried_only_if_it_changed(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    reads = 0
    waiting = queue.database.waiting

    def counted(candidates: int) -> Any:
        nonlocal reads
        reads += 1
        return waiting(candidates)

    def looks(wanted: Generate) -> Generator[FromWorker]:
        # The job has asked once, for its message.
        seen.append(wanted.upcoming)
        before = reads
        assert queue.upcoming() == wanted.upcoming
        assert reads == before
        [more] = queue.dispatcher.accept(made_up(Request("x", "c"), "c"))
        seen.append(queue.upcoming())
        queue.dispatcher.cancel(more.id)
        seen.append(queue.upcoming())
        queue.supervisor.script = done
        yield from done(wanted)

    queue.supervisor.script = looks
    queue.dispatcher.accept(*(made_up(Request("x", name), name) for name in ("a", "a", "b")))
    last = queue.database.jobs()[0]
    monkeypatch.setattr(queue.database, "waiting", counted)
    queue.dispatcher.start()
    assert queue.ended(last).state == "done"
    assert seen == [("a", "b"), ("a", "b", "c"), ("a", "b")]


def test_several_are_queued_or_none(queue: Queue) -> None:
    queue.accept()
    wanted = made_up(Request("x", "starter-noto"), "d")
    with pytest.raises(QueueFullError):
        queue.dispatcher.accept(wanted, wanted, wanted)
    assert queue.database.queued() == 1
    assert len(queue.dispatcher.accept(wanted, wanted)) == 2


def test_the_queue_has_no_more_jobs_than_allowed_also_if_many_arrive_at_once(queue: Queue) -> None:
    wanted = made_up(Request("x", "starter-noto"), "d")

    def fits(_: int) -> bool:
        try:
            return bool(queue.dispatcher.accept(wanted))
        except QueueFullError:
            return False

    with ThreadPoolExecutor(8) as clients:
        assert sum(clients.map(fits, range(24))) == queue.database.queued() == 3


def test_a_preview_becomes_a_file_only_for_somebody_who_listens(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Preview] = []
    previews: list[str | None] = []

    def encode(preview: Preview) -> str:
        encoded.append(preview)
        return "data:"

    def draws(wanted: Generate) -> Generator[FromWorker]:
        yield Progressed(wanted.job_id, Progress("denoise", 0, 1, 1, preview=Preview(bytes(3), 1, 1)))
        yield from done(wanted)

    monkeypatch.setattr(job_runner, "preview_url", encode)
    queue.supervisor.script = draws
    first = queue.accept()
    queue.dispatcher.start()
    queue.ended(first)
    assert encoded == []
    queue.events.subscribe(lambda event: previews.append(event.data.get("preview")), ("progress",))
    queue.ended(queue.accept())
    assert len(encoded) == 1
    assert previews == ["data:"]


def test_what_nobody_foresaw_fails_its_job_and_no_other(queue: Queue) -> None:
    def stumbles(wanted: Generate) -> Generator[FromWorker]:
        queue.supervisor.script = done
        raise ZeroDivisionError("by zero")
        yield Ended(wanted.job_id, "done", "", ())

    queue.supervisor.script = stumbles
    first, second = queue.accept(), queue.accept()
    queue.dispatcher.start()
    assert queue.ended(second).state == "done"
    assert (queue.ended(first).state, queue.ended(first).reason) == ("failed", "ZeroDivisionError: by zero")


def test_one_request_that_cannot_be_read_fails_alone(queue: Queue, tmp_path: Path) -> None:
    first, second = queue.accept(), queue.accept()
    with sqlite3.connect(tmp_path / "safelight.db") as other:
        other.execute(
            "UPDATE jobs SET document = json_set(document, '$.request.of', 'tomorrow') WHERE id = ?", (first.id,)
        )
    queue.dispatcher.start()
    bad, good = queue.ended(first), queue.ended(second)
    assert (bad.state, bad.failure, good.state) == ("failed", "input", "done")
    assert "cannot read its request" in bad.reason


def test_with_a_full_disk_nothing_is_lost_and_it_is_said_once(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True]
    tries = 0

    def fails(wanted: Generate) -> Generator[FromWorker]:
        nonlocal tries
        tries += 1
        if full[0]:
            raise StorageError(Path("disk"), "cannot be written: No space left on device")
        yield from done(wanted)

    queue.supervisor.script = fails
    first, second = queue.accept(), queue.accept()
    with capture_logs() as told:
        queue.dispatcher.start()
        until = time.monotonic() + 5
        while not queue.dispatcher.trouble and time.monotonic() < until:
            time.sleep(0.01)
        assert "No space left" in queue.dispatcher.trouble
        time.sleep(1.0)
        assert tries < 8
        full[0] = False
        assert [queue.ended(job).state for job in (first, second)] == ["done", "done"]
    assert len([one for one in told if one["event"] == "the queue waits"]) == 1
    until = time.monotonic() + 5
    while queue.dispatcher.trouble and time.monotonic() < until:
        time.sleep(0.01)
    assert queue.dispatcher.trouble == ""


def test_a_job_waits_when_its_worker_finds_the_disk_full(queue: Queue) -> None:
    full = [True]

    def ends(wanted: Generate) -> Generator[FromWorker]:
        if full[0]:
            full[0] = False
            yield Ended(wanted.job_id, "storage", "disk: cannot be written", ())
        else:
            yield from done(wanted)

    queue.supervisor.script = ends
    queue.dispatcher.start()
    assert queue.ended(queue.accept()).state == "done"


@pytest.mark.parametrize("kind", ["input", "failed", "device"])
def test_why_a_job_failed_is_kept(queue: Queue, kind: str) -> None:
    def ends(wanted: Generate) -> Generator[FromWorker]:
        yield Ended(wanted.job_id, kind, "because", ())  # type: ignore[arg-type]

    queue.supervisor.script = ends
    queue.dispatcher.start()
    job = queue.ended(queue.accept())
    assert (job.state, job.failure, job.reason) == ("failed", kind, "because")
    status = {"input": 422, "failed": 500, "device": 503}[kind]
    assert problems.of_job(job).status == status
