"""Any sequence of switch, budget, cancel, failure, fault, replaced file: what must always hold, holds.

``make test`` tries a tenth of the sequences that ``make proof`` tries.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import memory, toy
from support.scale import times

from safelight.devices.base import READ_AHEAD
from safelight.devices.simulated import Faults, Simulated
from safelight.errors import IntegrityError, OutOfMemoryError, SafelightError, TransferError
from safelight.memory.budget import HOST
from safelight.memory.lease import Use
from safelight.memory.segments import split_into_segments
from safelight.models.bind import bind

NAMES = ("A", "B", "C")
X = torch.randn(2, toy.WIDTH, generator=torch.Generator().manual_seed(9))


class Cancelled(Exception):
    pass


class Switching(RuleBasedStateMachine):
    """Three models, a device of small memory, and all that goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.folder = tempfile.TemporaryDirectory()
        self.states = {name: toy.weights(seed) for seed, name in enumerate(NAMES)}
        self.paths = {name: Path(self.folder.name) / name for name in NAMES}
        self.models = {}
        for name in NAMES:
            toy.write(self.paths[name], self.states[name])
            self.models[name] = toy.manifest(self.paths[name], self.states[name], name)
        self.right = {name: toy.output(self.states[name], X) for name in NAMES}
        self.size = sum(segment.nbytes for segment in split_into_segments(self.models["A"], torch.float32))
        self.least = max(segment.nbytes for segment in split_into_segments(self.models["A"], torch.float32)) * (
            READ_AHEAD + 1
        )
        self.device = Simulated(nbytes=1 << 20, latency=0.0)
        self.residency = memory.on(self.device, self.size * 2, self.size * 2)
        self.skeletons = toy.skeletons()
        self.replaced: set[str] = set()
        self.kept: list[object] = []

    @initialize(seed=st.integers(0, 3))
    def order(self, seed: int) -> None:
        self.device._chance.seed(seed)

    def use(self, name: str, passes: int, stop_at: int | None, shrink_to: int | None) -> None:
        """One generation: bind, run some passes, perhaps stop or lose memory between them."""
        at = self.device.torch
        before = vars(self.device.faults).copy()
        try:
            with (
                self.residency.lease(self.models[name], torch.float32, Use(forward_passes=passes)) as lease,
                bind(self.skeletons, toy.key(at), lease) as module,
                torch.no_grad(),
            ):
                for number in range(passes):
                    if number == stop_at:
                        raise Cancelled
                    got = module(X.to(at)).cpu()
                    assert torch.equal(got, self.right[name]), "a wrong image"
                    if shrink_to is not None:
                        self.residency.ledger.set_budget(self.device.name, shrink_to)
                    lease.adjust()
                    assert self.residency.ledger.stored(self.device.name) == self.device.allocated()
        except Cancelled:
            pass
        except IntegrityError:
            assert name in self.replaced
        except TransferError:
            assert before["corrupted"] > 3
        except OutOfMemoryError:
            expected = self.residency.ledger.budget(self.device.name) < self.least
            expected |= self.residency.ledger.budget(HOST) < self.least
            assert expected or before["failed_allocations"] > 0

    @rule(name=st.sampled_from(NAMES), passes=st.integers(1, 3))
    def switch(self, name: str, passes: int) -> None:
        self.use(name, passes, None, None)

    @rule(name=st.sampled_from(NAMES), stop_at=st.integers(0, 2))
    def cancel(self, name: str, stop_at: int) -> None:
        self.use(name, 3, stop_at, None)

    @rule(name=st.sampled_from(NAMES), share=st.floats(0.3, 2))
    def budget_changes_meanwhile(self, name: str, share: float) -> None:
        self.use(name, 3, None, int(self.size * share))

    @rule(share=st.floats(0.05, 3), where=st.sampled_from([HOST, "simulated"]))
    def budget(self, share: float, where: str) -> None:
        self.residency.ledger.set_budget(where, int(self.size * share))

    @rule(times=st.integers(1, 3))
    def lose_waits(self, times: int) -> None:
        self.device.faults.lost_waits = times

    @rule(times=st.integers(1, 3))
    def free_sources(self, times: int) -> None:
        self.device.faults.early_frees = times

    @rule(times=st.integers(1, 12))
    def corrupt(self, times: int) -> None:
        self.device.faults.corrupt_above, self.device.faults.corrupted = 0, times

    @rule(times=st.integers(1, 2))
    def fail_allocations(self, times: int) -> None:
        self.device.faults.failed_allocations = times

    @rule()
    def no_more_faults(self) -> None:
        for name, value in vars(Faults()).items():
            setattr(self.device.faults, name, value)

    @rule(name=st.sampled_from(NAMES))
    def replace_file(self, name: str) -> None:
        toy.write(self.paths[name], toy.weights(77))
        self.replaced.add(name)

    @precondition(lambda self: self.replaced)
    @rule()
    def restore_files(self) -> None:
        for name in self.replaced:
            toy.write(self.paths[name], self.states[name])
        self.replaced.clear()

    @rule(name=st.sampled_from(NAMES))
    def keep_a_module(self, name: str) -> None:
        """Somebody keeps the module and an exception; nothing of the weights may live in them."""
        at = self.device.torch
        with (
            contextlib.suppress(SafelightError),
            self.residency.lease(self.models[name], torch.float32) as lease,
            bind(self.skeletons, toy.key(at), lease) as module,
        ):
            self.kept.append(module)

    @rule()
    def drop(self) -> None:
        for tier in memory.tiers(self.residency):
            tier.drop()

    @invariant()
    def the_ledger_is_exact(self) -> None:
        for tier in memory.tiers(self.residency):
            pool = tier.pool
            # Looking at what lingers drops what nobody holds any more.
            lingering = pool.lingering_bytes
            there = pool.used_bytes + pool.cached_bytes + lingering
            assert tier.ledger.stored(tier.place) == there
            assert tier.ledger.reserved(tier.place) == 0
            assert all(usage.leases == 0 for usage in tier.usage_by_component())
        assert self.residency.ledger.stored(self.device.name) == self.device.allocated()

    def teardown(self) -> None:
        gc.collect()
        self.drop()
        self.the_ledger_is_exact()
        assert self.device.allocated() == 0, self.residency.ledger.entries()
        assert self.residency.ledger.stored(HOST) == 0
        self.device.close()
        self.folder.cleanup()


def test_sequences_of_everything_keep_the_invariants() -> None:
    run_state_machine_as_test(
        Switching,
        settings=settings(max_examples=times(25, 150), stateful_step_count=10, deadline=None, print_blob=True),
    )


@pytest.mark.proof
def test_sequences_of_everything_keep_the_invariants_proof() -> None:
    count = int(os.environ.get("SAFELIGHT_SEQUENCES", "2000"))
    run_state_machine_as_test(
        Switching, settings=settings(max_examples=count, stateful_step_count=8, deadline=None, print_blob=True)
    )
