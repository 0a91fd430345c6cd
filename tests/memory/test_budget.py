"""The ledger: charged and credited exactly, never over the budget, whatever threads do."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.memory.budget import HOST, Ledger, OverBudget


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=30))
def test_never_over_the_budget_and_exact(asked: list[tuple[int, bool]]) -> None:
    ledger, there = Ledger({HOST: 100}), {}
    for number, (nbytes, stored) in enumerate(asked):
        if number % 3 == 2 and there:
            gone = next(iter(there))
            ledger.credit(gone)
            del there[gone]
        with contextlib.suppress(OverBudget):
            there[ledger.charge(HOST, nbytes, "x", "y", stored)] = (nbytes, stored)
        assert ledger.stored(HOST) == sum(n for n, s in there.values() if s)
        assert ledger.reserved(HOST) == sum(n for n, s in there.values() if not s)
        assert ledger.free(HOST) == 100 - sum(n for n, _ in there.values()) >= 0
    assert len(ledger.entries()) == len(there)


def test_a_budget_below_what_is_used_lets_nothing_in_until_enough_went() -> None:
    ledger = Ledger({HOST: 100})
    number = ledger.charge(HOST, 80, "a", "b")
    ledger.set_budget(HOST, 50)
    assert ledger.free(HOST) == -30
    with pytest.raises(OverBudget):
        ledger.charge(HOST, 1, "a", "b")
    ledger.credit(number)
    assert ledger.charge(HOST, 50, "a", "b")
    assert ledger.peak(HOST) == 80


def test_threads_cannot_overdraw() -> None:
    ledger = Ledger({HOST: 1000})

    def take(_: int) -> int:
        try:
            return ledger.charge(HOST, 7, "t", "u")
        except OverBudget:
            return 0

    with ThreadPoolExecutor(8) as pool:
        taken = [number for number in pool.map(take, range(500)) if number]
    assert len(taken) == len(set(taken)) == 1000 // 7


def test_an_entry_says_whose_it_is() -> None:
    ledger = Ledger({HOST: 10, "cuda": 20})
    number = ledger.charge("cuda", 5, "unet", "weights")
    ledger.rename(number, "", "cached for reuse")
    (entry,) = ledger.entries()
    assert (entry.place, entry.nbytes, entry.owner, entry.reason) == ("cuda", 5, "", "cached for reuse")
    assert ledger.places() == (HOST, "cuda")
    with pytest.raises(KeyError):
        ledger.credit(99)
