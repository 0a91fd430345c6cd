"""The queue's order keeps its bound, whatever comes, and switches rarely."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.queue.order import OvertakeLimits, Waiting, choose, in_order, overtaken_once

GROUPS = "abcd"


def waiting(number: int, group: str, **more) -> Waiting:
    return Waiting(str(number), number, group, **more)


def drained(
    jobs: list[Waiting], limits: OvertakeLimits, seconds: float = 1.0, resident: tuple[str, ...] = ()
) -> list[Waiting]:
    """All jobs in the order in which they are started, as they were then."""
    started: list[Waiting] = []
    while (choice := choose(jobs, resident, limits)) is not None:
        (chosen,) = (job for job in jobs if job.id == choice.id)
        started.append(chosen)
        resident = (chosen.group, *(group for group in resident if group != chosen.group))
        jobs = [
            overtaken_once(job, seconds) if job.number < chosen.number else job for job in jobs if job is not chosen
        ]
    return started


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 2)), max_size=40),
    st.integers(0, 6),
    st.sampled_from([3.0, float("inf")]),
)
def test_all_are_started_once_and_none_is_overtaken_more_often_than_allowed(
    asked: list[tuple[str, int]], overtakes: int, seconds: float
) -> None:
    jobs = [waiting(n, group, priority=priority) for n, (group, priority) in enumerate(asked)]
    started = drained(jobs, OvertakeLimits(overtakes, seconds))
    assert sorted(job.number for job in started) == list(range(len(jobs)))
    for place, job in enumerate(started):
        later = sum(other.number > job.number for other in started[:place])
        assert job.overtaken == later <= overtakes
        assert job.delayed <= seconds


@given(st.lists(st.sampled_from(GROUPS), max_size=30))
def test_without_overtaking_it_is_first_come_first_served(groups: list[str]) -> None:
    started = drained([waiting(n, group) for n, group in enumerate(groups)], OvertakeLimits(0))
    assert [job.number for job in started] == list(range(len(groups)))


def test_jobs_of_one_model_go_together() -> None:
    jobs = [waiting(n, group) for n, group in enumerate("abcabcabc")]
    assert "".join(job.group for job in drained(jobs, OvertakeLimits(8))) == "aaabbbccc"
    assert "".join(job.group for job in drained(jobs, OvertakeLimits(8), resident=("b",))) == "bbbaaaccc"


def test_what_is_in_memory_needs_no_switch() -> None:
    jobs = [waiting(n, group) for n, group in enumerate("abc")]
    choice = choose(jobs, ("d", "c"), OvertakeLimits())
    assert choice is not None
    assert (choice.id, choice.reason) == ("2", "its model is in memory")


def test_priority_goes_first_but_not_for_ever() -> None:
    jobs = [waiting(0, "a"), *(waiting(n, "b", priority=5) for n in range(1, 9))]
    assert [job.number for job in drained(jobs, OvertakeLimits(4))] == [1, 2, 3, 4, 0, 5, 6, 7, 8]


def test_nobody_is_delayed_longer_than_allowed() -> None:
    jobs = [waiting(0, "a"), *(waiting(n, "b") for n in range(1, 9))]
    started = drained(jobs, OvertakeLimits(64, 25.0), seconds=10.0, resident=("b",))
    assert [job.number for job in started] == [1, 2, 3, 0, 4, 5, 6, 7, 8]
    choice = choose([waiting(0, "a", delayed=30.0), waiting(1, "b")], ("b",), OvertakeLimits(64, 25.0))
    assert choice is not None
    assert "delayed it by 30 s" in choice.reason


def test_the_order_is_said_beforehand_with_its_reasons() -> None:
    jobs = [waiting(n, group) for n, group in enumerate("abab")]
    said = in_order(jobs, ("b",), OvertakeLimits(), 9)
    assert [choice.id for choice in said] == ["1", "3", "0", "2"]
    assert said[0].reason == "its model is in memory"
    assert choose([], (), OvertakeLimits()) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 2)), max_size=60),
    st.integers(0, 6),
    st.integers(1, 8),
)
def test_what_is_said_beforehand_is_what_happens(asked: list[tuple[str, int]], overtakes: int, limit: int) -> None:
    jobs = [waiting(n, group, priority=priority) for n, (group, priority) in enumerate(asked)]
    limits = OvertakeLimits(overtakes, float("inf"))
    said = [choice.id for choice in in_order(jobs, (), limits, limit)]
    assert said == [job.id for job in drained(jobs, limits, seconds=0.0)][:limit]
