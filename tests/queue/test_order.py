"""The queue's order keeps its bound, whatever comes, and switches rarely."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.queue.order import Choice, Costs, OvertakeLimits, SlotView, Waiting, choose, in_order, overtaken_once
from safelight.queue.shares import Shares

GROUPS = "abcd"


def waiting(number: int, group: str, **more) -> Waiting:
    return Waiting(str(number), number, group, **more)


def drained(
    jobs: list[Waiting], limits: OvertakeLimits, seconds: float = 1.0, resident: tuple[str, ...] = ()
) -> list[Waiting]:
    """All jobs in the order in which they are started, as they were then."""
    started: list[Waiting] = []
    while (choice := choose(jobs, SlotView("", resident), limits)) is not None:
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
    choice = choose(jobs, SlotView("", ("d", "c")), OvertakeLimits())
    assert choice is not None
    assert (choice.id, choice.reason) == ("2", "its model is in memory")


def test_priority_goes_first_but_not_for_ever() -> None:
    jobs = [waiting(0, "a"), *(waiting(n, "b", priority=5) for n in range(1, 9))]
    assert [job.number for job in drained(jobs, OvertakeLimits(4))] == [1, 2, 3, 4, 0, 5, 6, 7, 8]


def test_nobody_is_delayed_longer_than_allowed() -> None:
    jobs = [waiting(0, "a"), *(waiting(n, "b") for n in range(1, 9))]
    started = drained(jobs, OvertakeLimits(64, 25.0), seconds=10.0, resident=("b",))
    assert [job.number for job in started] == [1, 2, 3, 0, 4, 5, 6, 7, 8]
    choice = choose([waiting(0, "a", delayed=30.0), waiting(1, "b")], SlotView("", ("b",)), OvertakeLimits(64, 25.0))
    assert choice is not None
    assert "delayed it by 30 s" in choice.reason


def test_the_order_is_said_beforehand_with_its_reasons() -> None:
    jobs = [waiting(n, group) for n, group in enumerate("abab")]
    said = [choice for choice, _ in in_order(jobs, [SlotView("", ("b",))], OvertakeLimits(), 9)]
    assert [choice.id for choice in said] == ["1", "3", "0", "2"]
    assert said[0].reason == "its model is in memory"
    assert choose([], SlotView(), OvertakeLimits()) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 2)), max_size=60),
    st.integers(0, 6),
    st.integers(1, 8),
)
def test_what_is_said_beforehand_is_what_happens(asked: list[tuple[str, int]], overtakes: int, limit: int) -> None:
    jobs = [waiting(n, group, priority=priority) for n, (group, priority) in enumerate(asked)]
    limits = OvertakeLimits(overtakes, float("inf"))
    said = [choice.id for choice, _ in in_order(jobs, [SlotView()], limits, limit)]
    assert said == [job.id for job in drained(jobs, limits, seconds=0.0)][:limit]


SLOT = st.tuples(
    st.permutations(GROUPS).map(lambda groups: tuple(groups[:2])), st.floats(0.0, 1e4), st.floats(0.0, 1e4)
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.sampled_from("ab")), max_size=30),
    st.lists(SLOT, min_size=1, max_size=5),
    st.floats(0.1, 1e4),
)
def test_what_is_said_beforehand_takes_few_choices_with_any_slots(
    asked: list[tuple[str, str]], slots: list[tuple[tuple[str, ...], float, float]], switch: float
) -> None:
    jobs = [waiting(n, group, person=person) for n, (group, person) in enumerate(asked)]
    views = [SlotView(str(n), groups, busy, 0.0 if busy else free) for n, (groups, busy, free) in enumerate(slots)]
    choices = 0

    def counted(*arguments: Any) -> Choice | None:
        nonlocal choices
        choices += 1
        # Each slot asks at most once for each job that starts or ends.
        assert choices <= len(slots) * (2 * len(jobs) + len(slots) + 1)
        return choose(*arguments)

    with patch("safelight.queue.order.choose", counted):
        said = list(in_order(jobs, views, OvertakeLimits(), 12, costs=Costs(lambda _: switch)))
    ids = [choice.id for choice, _ in said]
    assert len(set(ids)) == len(ids) == min(12, len(jobs))


SECONDS = Costs(lambda _: 3.0, lambda _: 10.0)


def test_a_model_that_another_slot_holds_is_left_to_it_while_that_is_quicker() -> None:
    busy = SlotView("busy", ("a",), free_in=2.0)
    assert choose([waiting(0, "a")], SlotView("free"), OvertakeLimits(), [busy], costs=SECONDS) is None
    # For a model that nobody holds, the free slot switches at once.
    choice = choose([waiting(0, "a"), waiting(1, "b")], SlotView("free"), OvertakeLimits(), [busy], costs=SECONDS)
    assert (choice and choice.id) == "1"
    # Behind a long job, or behind others that wait for the same model, a second slot takes it.
    late = SlotView("busy", ("a",), free_in=8.0)
    choice = choose([waiting(0, "a")], SlotView("free"), OvertakeLimits(), [late], costs=SECONDS)
    assert choice is not None
    assert choice.reason == "busy has its model, and a switch of 3.0 s is quicker than waiting 8.0 s for it"
    choice = choose([waiting(n, "a") for n in range(3)], SlotView("free"), OvertakeLimits(), [busy], costs=SECONDS)
    assert (choice and choice.id) == "1"


def test_the_slot_that_was_free_longest_switches() -> None:
    other = SlotView("other", ("b",), free_for=30.0)
    assert choose([waiting(0, "a")], SlotView("here", ("c",), free_for=5.0), OvertakeLimits(), [other]) is None
    assert choose([waiting(0, "a")], SlotView("here", ("c",), free_for=60.0), OvertakeLimits(), [other]) is not None


def test_what_failed_on_a_slot_is_tried_on_another() -> None:
    job, other = waiting(0, "a", slot="here"), SlotView("other", ("a",), free_for=1.0)
    assert choose([job], SlotView("here", ("a",), free_for=9.0), OvertakeLimits(), [other]) is None
    here = SlotView("here", ("a",), free_for=9.0)
    assert choose([job], SlotView("other", free_for=1.0), OvertakeLimits(), [here]) is not None
    # With one slot, or if no other takes jobs, there is no other.
    assert choose([job], SlotView("here"), OvertakeLimits()) is not None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.sampled_from("xyz"), st.integers(0, 2)), max_size=40),
    st.integers(0, 6),
    st.integers(1, 4),
    st.lists(st.floats(0.5, 9.0), min_size=40, max_size=40),
)
def test_the_bounds_hold_over_all_slots_and_people_take_turns(
    asked: list[tuple[str, str, int]], overtakes: int, count: int, took: list[float]
) -> None:
    limits, shares = OvertakeLimits(overtakes, float("inf"), lead=12.0), Shares()
    left = [waiting(n, group, person=person, priority=rank) for n, (group, person, rank) in enumerate(asked)]
    slots = {str(name): SlotView(str(name)) for name in range(count)}
    ends: list[tuple[float, str]] = []
    now, started = 0.0, list[Waiting]()
    while left:
        for name, slot in list(slots.items()):
            if any(place == name for _, place in ends):
                continue
            others = [one for other, one in slots.items() if other != name]
            leads = shares.leads({job.person for job in left})
            choice = choose(left, slot, limits, others, leads, SECONDS)
            if choice is None:
                continue
            chosen = next(job for job in left if job.id == choice.id)
            # Nobody who waits is behind by more than the lead.
            assert leads[chosen.person] <= limits.lead + min(leads.values())
            started.append(chosen)
            seconds = took[len(started) - 1]
            shares.charge(chosen.person, seconds)
            ends.append((now + seconds, name))
            slots[name] = SlotView(name, (chosen.group,), free_in=seconds)
            left = [
                overtaken_once(job, seconds) if job.number < chosen.number and job.person == chosen.person else job
                for job in left
                if job is not chosen
            ]
        if left:
            assert ends, "a slot is busy, or takes a job"
            ends.sort()
            at, name = ends.pop(0)
            slots = {
                other: SlotView(other, slot.resident, max(0.0, slot.free_in - (at - now)))
                for other, slot in slots.items()
            }
            slots[name] = SlotView(name, slots[name].resident)
            now = at
    assert sorted(job.number for job in started) == list(range(len(asked)))
    for place, job in enumerate(started):
        assert job.overtaken <= overtakes
        assert job.overtaken == sum(o.number > job.number and o.person == job.person for o in started[:place])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GROUPS), st.sampled_from("xy"), st.integers(0, 1)), max_size=40),
    st.integers(0, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0.5, 9.0), st.booleans()), min_size=80, max_size=80),
)
def test_the_bounds_hold_when_workers_die_and_jobs_are_tried_again(
    asked: list[tuple[str, str, int]], overtakes: int, count: int, fates: list[tuple[float, bool]]
) -> None:
    """A job whose worker dies goes to another slot, once."""
    limits = OvertakeLimits(overtakes, float("inf"))
    left = [waiting(n, group, person=person, priority=rank) for n, (group, person, rank) in enumerate(asked)]
    resident: dict[str, tuple[str, ...]] = {str(name): () for name in range(count)}
    runs: dict[str, tuple[float, Waiting, bool]] = {}
    now, ended, starts = 0.0, list[int](), 0
    while left or runs:
        views = {
            name: SlotView(name, held, max(0.0, runs[name][0] - now) if name in runs else 0.0)
            for name, held in resident.items()
        }
        for name in resident.keys() - runs.keys():
            choice = choose(left, views[name], limits, [one for at, one in views.items() if at != name], {}, SECONDS)
            if choice is None:
                continue
            chosen = next(job for job in left if job.id == choice.id)
            assert not chosen.slot or chosen.slot != name or count == 1
            seconds, dies = fates[starts]
            starts += 1
            runs[name] = (now + seconds, chosen, dies and not chosen.slot)
            resident[name] = (chosen.group,)
            left = [
                overtaken_once(job, seconds) if job.number < chosen.number and job.person == chosen.person else job
                for job in left
                if job is not chosen
            ]
            assert all(job.overtaken <= overtakes for job in left)
        assert runs, "a slot is busy, or takes a job"
        now, name = min((run[0], name) for name, run in runs.items())
        _, job, died = runs.pop(name)
        if died:
            left.append(replace(job, slot=name))
        else:
            ended.append(job.number)
    assert sorted(ended) == list(range(len(asked)))


def test_a_thousand_jobs_of_one_person_do_not_keep_four_others_waiting() -> None:
    """Each of the four has every fifth second: their jobs wait for no more than the lead and one round."""
    limits, shares = OvertakeLimits(lead=20.0), Shares()
    left = [waiting(n, GROUPS[n % 4], person="heavy") for n in range(1000)]
    left += [waiting(1000 + n, GROUPS[n % 4], person=f"p{n % 4}") for n in range(40)]
    slot, now, ended = SlotView(), 0.0, dict[str, float]()
    while any(job.person != "heavy" for job in left):
        choice = choose(left, slot, limits, (), shares.leads({job.person for job in left}))
        assert choice is not None
        chosen = next(job for job in left if job.id == choice.id)
        now += 1.0
        ended[chosen.id] = now
        shares.charge(chosen.person, 1.0)
        slot = SlotView("", (chosen.group,))
        left = [job for job in left if job is not chosen]
    for number in range(40):
        # Ten jobs of each: the last of them needs ten turns of five people, and the lead of each of the others.
        assert ended[str(1000 + number)] <= 5 * (number // 4 + 1) + 4 * limits.lead + 5


def test_a_person_who_comes_back_has_saved_up_no_turns() -> None:
    shares = Shares()
    shares.leads({"a"})
    for _ in range(100):
        shares.charge("a", 10.0)
    assert shares.leads({"a", "b"}) == {"a": 0.0, "b": 0.0}
    shares.charge("b", 5.0)
    assert shares.leads({"a", "b"}) == {"a": 0.0, "b": 5.0}
    assert shares.leads({"b"}) == {"b": 0.0}
    weighted = Shares({"a": 1.0, "b": 2.0}.__getitem__)
    for person in "ab":
        weighted.charge(person, 10.0)
    assert weighted.leads({"a", "b"}) == {"a": 5.0, "b": 0.0}
