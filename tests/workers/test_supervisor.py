"""The supervisor runs a worker process and a spare."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from support.jobs import resolved
from support.serving import still_there

from safelight.assembly.programs import WORKER
from safelight.errors import WorkerDiedError
from safelight.request.schema import Request
from safelight.settings_sources import load_settings
from safelight.workers.messages import Cancel, Ended, Generate, Made, Progressed
from safelight.workers.supervisor import Supervisor

STARTER = "starter-noto"


@pytest.fixture
def supervisor(tmp_path: Path) -> Generator[Supervisor]:
    made = Supervisor(WORKER, load_settings(tmp_path))
    yield made
    made.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Generator[Supervisor]:
    """A supervisor for all tests that do not kill its worker."""
    made = Supervisor(WORKER, load_settings(tmp_path_factory.mktemp("root")), spare=False)
    yield made
    made.close()


def wanted(steps: int = 2, job: str = "j", **more) -> Generate:
    digest = more.pop("digest", "")
    return Generate(job, resolved(Path("/nowhere"), Request("red apple", STARTER, steps=steps, **more), digest), 0, ())


def test_a_job_reports_and_ends(supervisor: Supervisor) -> None:
    messages = list(supervisor.run(wanted(count=2)))
    assert [m.index for m in messages if isinstance(m, Made)] == [0, 1]
    previews = [m.progress.preview for m in messages if isinstance(m, Progressed) and m.progress.stage == "denoise"]
    assert all(preview is not None and len(preview.pixels) == 8 * 8 * 3 for preview in previews)
    end = messages[-1]
    assert isinstance(end, Ended)
    assert (end.kind, end.problem) == ("done", "")
    assert end.resident == (wanted().job.model.digest,)


@pytest.mark.full
def test_only_images_that_are_not_there_yet_are_made(calm: Supervisor) -> None:
    both = [m for m in calm.run(wanted(count=2)) if isinstance(m, Made)]
    ask = wanted(count=2)
    rest = [m for m in calm.run(Generate("j", ask.job, 1, ())) if isinstance(m, Made)]
    assert [(m.index, m.image.pixels_sha256) for m in rest] == [(1, both[1].image.pixels_sha256)]


def test_other_content_than_was_accepted_is_refused(calm: Supervisor) -> None:
    """STATE 18: a job uses the content that its model had when the server accepted the job."""
    (end,) = calm.run(wanted(digest="0" * 64))
    assert isinstance(end, Ended)
    assert end.kind == "failed"
    assert "its content changed after the job was accepted" in end.problem


def test_a_worker_that_dies_is_replaced_by_the_spare(supervisor: Supervisor) -> None:
    list(supervisor.run(wanted()))
    assert supervisor.spare_is_ready(60)
    first = supervisor.pid

    def killed() -> None:
        for message in supervisor.run(wanted(steps=150)):
            if isinstance(message, Progressed) and message.progress.stage == "denoise":
                os.kill(first, signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        killed()
    assert supervisor.pid != first
    assert supervisor.restarts == 1
    end = list(supervisor.run(wanted()))[-1]
    assert isinstance(end, Ended)
    assert end.kind == "done"


def test_a_job_is_cancelled_at_its_next_step(calm: Supervisor) -> None:
    for message in calm.run(wanted(steps=150)):
        if isinstance(message, Progressed) and message.progress.step == 2:
            calm.cancel("j")
    assert isinstance(message, Ended)
    assert message.kind == "cancelled"


def test_questions_are_answered_while_a_job_runs(calm: Supervisor) -> None:
    seen = False
    for message in calm.run(wanted(steps=40)):
        if isinstance(message, Progressed) and message.progress.step == 1 and not seen:
            seen = True
            assert calm.ask("memory").result(20)["places"]["host"]["stored"] > 0
            assert calm.ask("prefetch", "starter-fluent").result(20) is True
            with pytest.raises(RuntimeError, match="no model named"):
                calm.ask("load", "nobody").result(20)
    assert seen
    resident = calm.ask("load", "starter-fluent").result(20)
    assert wanted().job.model.digest in resident


@pytest.mark.full
def test_what_is_pinned_is_pinned_in_the_next_worker_too(supervisor: Supervisor) -> None:
    list(supervisor.run(wanted()))
    digest = wanted().job.model.digest
    assert digest in supervisor.ask("pin", STARTER).result(30)
    assert digest in supervisor.ask("unload", digest).result(30)
    os.kill(supervisor.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        list(supervisor.run(wanted()))
    list(supervisor.run(wanted()))
    assert digest in supervisor.ask("unload", digest).result(30)
    supervisor.ask("unpin", STARTER).result(30)
    assert digest not in supervisor.ask("unload", digest).result(30)


@pytest.mark.full
def test_an_idle_worker_and_a_spare_that_die_are_replaced(supervisor: Supervisor) -> None:
    list(supervisor.run(wanted()))
    assert supervisor.spare_is_ready(60)
    first = supervisor.pid
    os.kill(first, signal.SIGKILL)
    until = time.monotonic() + 30
    while supervisor.pid == first:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert wanted().job.model.digest in supervisor_loaded(supervisor)
    assert supervisor.spare_is_ready(60)
    spare = supervisor._spare
    assert spare is not None
    os.kill(spare.pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while supervisor._spare is spare or not supervisor.spare_is_ready():
        assert time.monotonic() < until
        time.sleep(0.02)


def supervisor_loaded(supervisor: Supervisor) -> list[str]:
    """The resident models after the present worker has used a model."""
    assert supervisor.run_settings(30) is not None
    list(supervisor.run(wanted()))
    return supervisor.ask("load", STARTER).result(30)


def test_what_an_abandoned_job_still_says_is_not_the_next_jobs(calm: Supervisor) -> None:
    """STATE 17: after a caller abandoned a job in the middle, the next job receives only its own images."""
    with contextlib.closing(calm.run(wanted(count=2, job="first"))) as messages:
        next(messages)
    told = list(calm.run(wanted(job="second", seed=9)))
    assert {message.job_id for message in told} == {"second"}  # type: ignore[union-attr]
    assert [message.image.seed for message in told if isinstance(message, Made)] == [9]


@pytest.mark.parametrize("until", [Progressed, Made])
def test_state_17_an_abandoned_job_that_runs_again_gets_only_its_own_messages(until: type, calm: Supervisor) -> None:
    """For example because its image could not be stored. What the first attempt still sent ended the second one."""
    first = calm.run(wanted(steps=20, count=2, job="again"))
    next(message for message in first if isinstance(message, until))
    first.close()
    messages = list(calm.run(wanted(steps=2, count=2, job="again")))
    assert [message.index for message in messages if isinstance(message, Made)] == [0, 1]
    assert isinstance(messages[-1], Ended)
    assert messages[-1].kind == "done"


def test_a_cancellation_that_comes_too_late_does_not_count_for_the_next_attempt(calm: Supervisor) -> None:
    assert list(calm.run(wanted(job="late")))[-1].kind == "done"
    calm._active.send(Cancel("late"))
    assert list(calm.run(wanted(job="late")))[-1].kind == "done"


def test_a_worker_that_cannot_start_is_said(tmp_path: Path) -> None:
    supervisor = Supervisor((sys.executable, "-c", "raise SystemExit(3)"), load_settings(tmp_path), spare=False)
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        list(supervisor.run(wanted()))
    supervisor.close()


def test_both_processes_end_with_the_supervisor(tmp_path: Path) -> None:
    supervisor = Supervisor(WORKER, load_settings(tmp_path))
    pid = supervisor.pid
    time.sleep(0.2)
    supervisor.close()
    assert not still_there(pid)
