"""Budgets follow the machine; working memory is measured and kept; verification costs what it may."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import pytest

from safelight.devices import machine
from safelight.devices import verification as verification_module
from safelight.devices.machine import MemoryLimit
from safelight.devices.simulated import simulated
from safelight.devices.verification import SAMPLE, Verification
from safelight.memory.budget import HOST, Ledger
from safelight.memory.limits import BudgetUpdater, count_once
from safelight.memory.working_memory import WorkingMemoryEstimator, Workload, counted_peak, polled_peak


def test_the_budget_shrinks_at_once_and_grows_by_steps() -> None:
    ledger, free = Ledger({HOST: 0}), [1000]
    updater = BudgetUpdater(ledger, HOST, lambda: MemoryLimit(free[0], "a test"), lambda: 0)
    updater.update_budget()
    assert ledger.budget(HOST) == 950
    assert updater.source == "a test"
    number = ledger.charge(HOST, 400, "x", "y")
    free[0] = 600
    updater.update_budget()
    assert ledger.budget(HOST) == 950, "what is stored is not lost to the budget"
    free[0] = 300
    updater.update_budget()
    assert ledger.budget(HOST) == 665
    free[0] = 320
    updater.update_budget()
    assert ledger.budget(HOST) == 665, "too little more to move bytes for"
    free[0] = 900
    updater.update_budget()
    assert ledger.budget(HOST) == 1235
    ledger.credit(number)


def test_the_reserve_is_left_alone() -> None:
    ledger = Ledger({HOST: 0})
    BudgetUpdater(ledger, HOST, lambda: MemoryLimit(1000, "x"), lambda: 0, least_reserve=900).update_budget()
    assert ledger.budget(HOST) == 100


def test_anonymous_memory_is_counted() -> None:
    grown: list[int] = []
    # Threads of earlier tests may still take memory or give it back, so one try of three is enough.
    for _ in range(3):
        before = machine.anonymous_bytes()
        # Not from an allocator, which may have freed memory to give out that is counted already.
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
            for _ in range(64):
                taken.write(b"x" * (1 << 20))
            grown.append(machine.anonymous_bytes() - before)
    assert any(50 << 20 < one < 90 << 20 for one in grown), grown


def test_working_memory_is_guessed_then_known_then_corrected(tmp_path: Path) -> None:
    path = tmp_path / "working.json"
    memory = WorkingMemoryEstimator(path)
    work = Workload("unet 320 fp32", 512 * 512, guess=1_000_000_000)
    assert memory.estimate(work) > 1_000_000_000
    assert not memory.knows(work)
    memory.learn(work, 300_000_000)
    assert 300_000_000 < memory.estimate(work) < 400_000_000
    memory.learn(work, 500_000_000)
    assert memory.estimate(work) > 500_000_000
    memory.learn(work, 100_000_000)
    assert 400_000_000 < memory.estimate(work) < 480_000_000
    again = WorkingMemoryEstimator(path)
    assert again.estimate(work) == memory.estimate(work)
    larger = Workload("unet 320 fp32", 1024 * 1024, guess=0)
    assert again.estimate(larger) > 3 * again.estimate(work)
    assert again.estimate(Workload("unet 320 fp32", 64 * 64, guess=0)) <= again.estimate(work)
    again.record_shortage(work)
    assert again.estimate(work) > 1.4 * memory.estimate(work)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"b": "c"}}'])
def test_a_damaged_record_is_measured_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "working.json"
    path.write_text(text)
    memory = WorkingMemoryEstimator(path)
    memory.learn(Workload("x", 1, 0), 5)
    assert json.loads(path.read_text()) == {"x": {"1": 5}}


def test_watching_finds_the_peak() -> None:
    used = [10]
    with polled_peak(lambda: used[0]) as most:
        used[0] = 70
        time.sleep(0.1)
        used[0] = 20
        time.sleep(0.02)
        assert most() == 60


def test_what_a_device_does_not_tell_is_not_measured() -> None:
    """MPS does not say what is allocated: learning 0 would let weights fill the memory that computing needs."""
    with polled_peak(lambda: None) as most:
        assert most() is None


def test_two_places_of_one_memory_share_what_is_promised() -> None:
    """A computation on one side was promised 600 bytes and uses 200: 400 look available, but not to the other side."""
    ledger, used = Ledger({HOST: 0, "mps": 0}), {HOST: 0, "mps": 0}
    here, there = (
        BudgetUpdater(ledger, place, lambda: MemoryLimit(1000, "a test"), lambda place=place: used[place])
        for place in (HOST, "mps")
    )
    count_once(here, there)
    ledger.charge("mps", 600, "unet", "computing", stored=False, already_used=True)
    used["mps"] = 200
    here.update_budget()
    assert ledger.budget(HOST) == int(0.95 * 600)
    there.update_budget()
    assert ledger.budget("mps") == int(0.95 * 1200)


def test_an_allocator_that_counts_its_peak_is_asked() -> None:
    """Polling would miss a tensor that lives for less than 4 ms."""
    with simulated() as device:
        kept = device.allocate(1 << 20)
        ledger = Ledger({device.name: 1 << 30})
        with counted_peak(device, lambda: ledger.changes(device.name)) as most:
            device.release(device.allocate(1 << 22))
            assert most() == 1 << 22
            number = ledger.charge(device.name, 512, "unet", "weights")
            assert most() is None
        with counted_peak(device, lambda: ledger.changes(device.name)) as most:
            ledger.charge(device.name, 512, "unet", "computing", stored=False)
            assert most() == 0
            ledger.credit(number)
            assert most() is None
        device.release(kept)


def test_policies() -> None:
    def due(policy: str, uses: int = 40) -> list[bool]:
        verification = Verification(policy)  # type: ignore[arg-type]
        return [verification.due(str(n % 2)) for n in range(uses)]

    assert all(due("always"))
    assert sum(due("first")) == 2
    assert sum(due("sample")) == 40 // SAMPLE + 1
    assert not any(due("off"))


def test_auto_verifies_as_long_as_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(verification_module.time, "perf_counter", lambda: now[0])
    cheap, dear = Verification("auto"), Verification("auto")
    for verification, seconds in ((cheap, 0.0), (dear, 0.02)):
        for _ in range(20):
            verification.add_computing_time(0.1)
            if verification.due("x"):
                with verification.timed():
                    now[0] += seconds
    assert cheap.verified == 20
    assert 1 <= dear.verified <= 4
    assert "of 20 verified" in dear.describe()
