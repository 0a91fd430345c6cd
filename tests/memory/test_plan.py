"""The planner: within the budget, complete, no useless move, more budget never moves more, always the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support.scale import times

from safelight.memory.plan import Piece, Plan, PlanInput, Refusal, Resident, plan

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@st.composite
def situations(draw: st.DrawFn) -> PlanInput:
    components = {name: [Piece(name, i, n) for i, n in enumerate(draw(sizes))] for name in "ABC"}
    held = {name: draw(st.booleans()) and name != "A" for name in components}
    residents = [
        Resident(piece, draw(st.integers(0, 5)), held[name])
        for name, pieces in components.items()
        for piece in pieces
        if draw(st.booleans())
    ]
    return PlanInput(
        budget=draw(st.integers(0, 600)),
        residents=tuple(residents),
        needed=tuple(components["A"]),
        forward_passes=draw(st.integers(1, 5)),
        upcoming=tuple(draw(st.permutations("BC"))[: draw(st.integers(0, 2))]),
        partial=draw(st.booleans()),
        ahead=draw(st.integers(0, 2)),
    )


def after(given_: PlanInput, decided: Plan) -> set[Piece]:
    """What is resident when the plan was carried out."""
    here = {resident.piece for resident in given_.residents}
    return here - set(decided.pieces("drop")) | set(decided.pieces("load"))


@settings(max_examples=times(500, 1500), deadline=None)
@given(situations())
def test_within_the_budget_complete_and_nothing_useless(given_: PlanInput) -> None:
    decided = plan(given_)
    assert decided == plan(given_)
    if isinstance(decided, Refusal):
        assert decided.least > decided.available
        enough = plan(replace(given_, budget=given_.budget + decided.least - decided.available))
        assert isinstance(enough, Plan)
        return
    resident = after(given_, decided)
    held = {r.piece for r in given_.residents if r.held}
    here = {r.piece for r in given_.residents}
    assert held <= resident, "what is leased was dropped"
    fits = sum(p.nbytes for p in here | set(given_.needed)) <= given_.budget
    assert sum(p.nbytes for p in resident) + decided.slots * decided.slot_bytes <= given_.budget
    streamed = set(decided.pieces("stream"))
    assert set(given_.needed) == (resident & set(given_.needed)) | streamed
    assert not streamed & resident
    assert set(decided.pieces("load")).isdisjoint(here)
    assert not (fits and decided.nbytes("drop")), "something was dropped although all fits"
    assert not streamed or (given_.partial and all(p.nbytes <= decided.slot_bytes for p in streamed))
    assert all(action.reason for action in decided.actions)


@settings(max_examples=times(500, 1500), deadline=None)
@given(situations(), st.integers(0, 200))
def test_more_budget_never_costs_more_bytes(given_: PlanInput, more: int) -> None:
    less, richer = plan(given_), plan(replace(given_, budget=given_.budget + more))
    if isinstance(less, Plan):
        assert isinstance(richer, Plan)
        assert richer.moved(given_.forward_passes) <= less.moved(given_.forward_passes)


def test_what_is_wanted_last_goes_first() -> None:
    a, b, c, d = (Piece(name, 0, 10) for name in "ABCD")
    residents = (Resident(b, last_used=9), Resident(c, last_used=1), Resident(d, last_used=5))
    decided = plan(PlanInput(30, residents, (a,), upcoming=("C",)))
    assert isinstance(decided, Plan)
    assert decided.pieces("drop") == (d,)
    decided = plan(PlanInput(20, residents, (a,), upcoming=("C",)))
    assert isinstance(decided, Plan)
    assert set(decided.pieces("drop")) == {b, d}
    assert "wanted again only after 0" not in str(decided)


def test_the_half_that_the_next_step_needs_stays() -> None:
    """A component that is there in part keeps the part; only what lacks is brought."""
    pieces = tuple(Piece("A", i, 10) for i in range(4))
    other = Piece("B", 0, 20)
    decided = plan(PlanInput(40, (Resident(pieces[3]), Resident(pieces[2]), Resident(other)), pieces))
    assert isinstance(decided, Plan)
    assert decided.pieces("keep") == pieces[2:]
    assert decided.pieces("load") == pieces[:2]
    assert decided.pieces("drop") == (other,)
