"""Several slots: each takes jobs, what one fails at another tries, and people take turns. Workers follow scripts."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.jobs import made_up
from support.scripted_queue import Queue, Told, done

from safelight.errors import WorkerDiedError
from safelight.queue.database import Database
from safelight.queue.events import Event
from safelight.queue.job import QueuedJob
from safelight.queue.order import OvertakeLimits
from safelight.request.results import Progress
from safelight.request.schema import Request
from safelight.workers.choosing import Choosing
from safelight.workers.messages import Ended, FromWorker, Generate, Progressed


@pytest.fixture
def queue(tmp_path: Path) -> Generator[Queue]:
    made = Queue(tmp_path, Told(), slots=2, most=100)
    yield made
    made.dispatcher.stop(0)
    made.database.close()


def accept(queue: Queue, model: str = "d", person: str = "") -> str:
    [job] = queue.dispatcher.accept(made_up(Request("x", "starter-noto"), model), person=person)
    return job.id


def ended(queue: Queue, job: str, seconds: float = 10.0) -> QueuedJob:
    until = time.monotonic() + seconds
    while True:
        found = queue.database.job(job)
        assert found is not None
        if found.ended is not None:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.005)


def test_two_jobs_run_at_once_on_two_slots(queue: Queue) -> None:
    both = threading.Barrier(2, timeout=8)

    def meets(wanted: Generate) -> Generator[FromWorker]:
        both.wait()
        yield Ended(wanted.job_id, "done", "", ())

    queue.supervisor.script = meets
    jobs = [accept(queue, "a"), accept(queue, "b")]
    queue.dispatcher.start()
    assert {ended(queue, job).slot for job in jobs} == {"slot:0", "slot:1"}
    assert [slot.switches for slot in queue.dispatcher.slots] == [1, 1]


def test_what_kills_one_worker_is_tried_on_the_other_slot(queue: Queue) -> None:
    seen = list[str]()

    def dies_once(wanted: Generate) -> Generator[FromWorker]:
        seen.append(next(slot for slot, one in queue.dispatcher.running().items() if one.job.id == wanted.job_id))
        if len(seen) == 1:
            raise WorkerDiedError("was killed")
        yield Ended(wanted.job_id, "done", "", ())

    queue.supervisor.script = dies_once
    job = accept(queue)
    queue.dispatcher.start()
    found = ended(queue, job)
    assert (found.state, found.attempts, len(set(seen))) == ("done", 2, 2)


def test_a_job_without_progress_is_taken_from_its_worker(tmp_path: Path) -> None:
    hangs = threading.Event()

    class Stuck(Told):
        def kill(self) -> None:
            hangs.set()

    def stuck(wanted: Generate) -> Generator[FromWorker]:
        if hangs.is_set():
            yield Ended(wanted.job_id, "done", "", ())
            return
        yield Progressed(wanted.job_id, Progress("denoise", 0, 1, 4))
        assert hangs.wait(10)
        raise WorkerDiedError("was killed by SIGKILL")

    queue = Queue(tmp_path, Stuck(), slots=2, most=100, stall_seconds=0.5)
    reasons = list[str]()

    def heard(event: Event) -> None:
        if event.kind == "worker":
            reasons.append(event.data.get("stalled", ""))

    queue.events.subscribe(heard)
    queue.supervisor.script = stuck
    job = accept(queue)
    queue.dispatcher.start()
    assert (ended(queue, job).state, ended(queue, job).attempts) == ("done", 2)
    assert "no progress in the stage denoise" in reasons[0]
    queue.dispatcher.stop(0)
    queue.database.close()


def test_the_queue_pauses_and_a_slot_drains(queue: Queue) -> None:
    queue.supervisor.script = done
    queue.dispatcher.pause(True)
    queue.dispatcher.start()
    jobs = [accept(queue) for _ in range(4)]
    time.sleep(0.3)
    assert queue.database.queued() == 4
    first, second = queue.dispatcher.slots
    assert queue.dispatcher.slot("nobody") is None
    queue.dispatcher.drain(first, True)
    queue.dispatcher.pause(False)
    assert {ended(queue, job).slot for job in jobs} == {"slot:1"}
    queue.dispatcher.drain(first, False)
    queue.dispatcher.drain(second, True)
    assert ended(queue, accept(queue)).slot == "slot:0"


def test_a_job_that_arrives_after_a_drain_is_not_given_to_the_slot(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot may be choosing while it is drained; what it chooses then was there before."""
    queue.supervisor.script = done
    waiting, choosing, accepted = queue.database.waiting, threading.Event(), threading.Event()

    def slow(limit: int) -> Any:
        choosing.set()
        accepted.wait(0.5)
        return waiting(limit)

    monkeypatch.setattr(queue.database, "waiting", slow)
    first, second = queue.dispatcher.slots
    queue.dispatcher.drain(first, True)
    queue.dispatcher.start()
    assert choosing.wait(10)
    queue.dispatcher.drain(second, True)
    job = accept(queue)
    accepted.set()
    time.sleep(0.2)
    assert queue.database.queued() == 1
    queue.dispatcher.drain(first, False)
    assert ended(queue, job).slot == "slot:0"


def test_a_worker_is_renewed_after_its_job(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """So all workers can be renewed one after the other, and no job is made again."""
    happened: list[str] = []

    def slow(wanted: Generate) -> Generator[FromWorker]:
        happened.append("begins")
        time.sleep(0.3)
        happened.append("ends")
        yield Ended(wanted.job_id, "done", "", ())

    queue.supervisor.script = slow
    monkeypatch.setattr(queue.supervisor, "kill", lambda: happened.append("killed"))
    first, second = queue.dispatcher.slots
    queue.dispatcher.drain(second, True)
    queue.dispatcher.start()
    jobs = [accept(queue) for _ in range(2)]
    until = time.monotonic() + 10
    while "begins" not in happened:
        assert time.monotonic() < until
        time.sleep(0.01)
    first.restarts_when_free = True
    queue.dispatcher.wake()
    assert [ended(queue, job).attempts for job in jobs] == [1, 1]
    assert happened == ["begins", "ends", "killed", "begins", "ends"]


def test_people_take_turns(queue: Queue) -> None:
    order = list[str]()

    def slow(wanted: Generate) -> Generator[FromWorker]:
        job = queue.database.job(wanted.job_id)
        assert job is not None
        order.append(job.person)
        time.sleep(0.02)
        yield Ended(wanted.job_id, "done", "", ())

    queue.supervisor.script = slow
    jobs = [accept(queue, "a", "ann") for _ in range(40)] + [accept(queue, "a", "bob") for _ in range(4)]
    queue.dispatcher.start()
    for job in jobs:
        ended(queue, job)
    # Bob's jobs run within his share, and not after all of Ann's.
    assert max(place for place, person in enumerate(order) if person == "bob") < 30


def test_a_cancelled_job_ends_on_whichever_slot_it_runs(queue: Queue) -> None:
    go = threading.Event()

    def waits(wanted: Generate) -> Generator[FromWorker]:
        assert go.wait(10)
        yield Ended(wanted.job_id, "cancelled" if wanted.job_id in queue.supervisor.cancelled else "done", "", ())

    queue.supervisor.script = waits
    queue.dispatcher.start()
    jobs = [accept(queue, "a"), accept(queue, "b")]
    until = time.monotonic() + 5
    while len(queue.dispatcher.running()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert queue.dispatcher.cancel(jobs[1])
    go.set()
    assert [ended(queue, job).state for job in jobs] == ["done", "cancelled"]


def test_the_library_is_read_once_for_a_whole_queue(tmp_path: Path) -> None:
    """Predicting a switch needs all models. A long queue must not read them for each job."""
    database, reads = Database(tmp_path), list[int]()

    def seconds() -> dict[str, float]:
        reads.append(1)
        return {"a": 2.0}

    database.accept(*(made_up(Request("x", "m"), "abc"[number % 3]) for number in range(30)))
    choosing = Choosing(database, OvertakeLimits(), seconds)
    assert len(choosing.in_order(30)) == 30
    assert len(reads) == 1
    database.close()
