"""Sequences of generations with the tiny pipeline: models, budgets, cancelling, faults; the pixels are always right."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from safetensors.torch import load_file
from support import checkpoints, memory
from support.compact_files import write_compact
from support.scale import times

import safelight
from safelight.assembly.engine import open_engine
from safelight.devices.simulated import Faults, Simulated
from safelight.errors import OutOfMemoryError, TransferError
from safelight.memory.budget import HOST
from safelight.settings_sources import load_settings

FOLDER = Path(tempfile.mkdtemp(prefix="safelight-tiny-"))
NAMES = ("a", "b", "c")
"""The last one is quantised. It stays so in memory when the budget is small."""

RIGHT: dict[tuple[str, int], str] = {}


def request(name: str, steps: int) -> safelight.Request:
    path = FOLDER / (f"{name}.gguf" if name == "c" else f"{name}.safetensors")
    if not path.exists():
        file = checkpoints.write_single(FOLDER / f"{name}.safetensors", "sd1", NAMES.index(name) + 1)
        if name == "c":
            tensors = {key: one for key, one in load_file(file).items() if one.is_floating_point()}
            write_compact(file, tensors, "Q8_0")
    return safelight.Request("red apple", str(path), steps=steps, width=64, height=64, precision="fp32")


def right(name: str, steps: int) -> str:
    """The pixels of a fresh engine on the CPU."""
    if (name, steps) not in RIGHT:
        engine = open_engine(load_settings(FOLDER / "root"))
        RIGHT[name, steps] = next(engine.generate(request(name, steps))).pixels_sha256
    return RIGHT[name, steps]


class Generating(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device = Simulated(nbytes=64 << 20)
        self.engine = open_engine(
            load_settings(FOLDER / "root", device_working_mem_gb=1e-6, verify_transfers="always"), self.device
        )
        self.residency = self.engine.resources.residency
        self.follow = self.residency.planner.before_planning

    @rule(name=st.sampled_from(NAMES), steps=st.integers(1, 2))
    def generate(self, name: str, steps: int) -> None:
        before = vars(self.device.faults).copy()
        try:
            image = next(self.engine.generate(request(name, steps)))
        except OutOfMemoryError as error:
            little = self.residency.ledger.budget(self.device.name) < 40_000_000
            if not (little or before["failed_allocations"]):
                raise AssertionError from error
        except TransferError as error:
            if before["corrupted"] <= 3:
                raise AssertionError from error
        else:
            assert image.pixels_sha256 == right(name, steps)

    @rule(name=st.sampled_from(NAMES), stop=st.integers(1, 6))
    def cancel(self, name: str, stop: int) -> None:
        seen = 0

        def count(_: safelight.Progress) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise safelight.Cancelled

        with contextlib.suppress(safelight.Cancelled, OutOfMemoryError, TransferError):
            next(self.engine.generate(request(name, 2), count))

    @rule(megabytes=st.integers(8, 64))
    def budget(self, megabytes: int) -> None:
        """What others leave on the device."""
        nbytes = megabytes << 20
        self.residency.planner.before_planning = lambda: self.residency.ledger.set_budget(self.device.name, nbytes)

    @rule(fault=st.sampled_from(["lost_waits", "early_frees", "failed_allocations"]), times=st.integers(1, 3))
    def fault(self, fault: str, times: int) -> None:
        setattr(self.device.faults, fault, times)

    @rule(times=st.integers(1, 6))
    def corrupt(self, times: int) -> None:
        self.device.faults.corrupt_above, self.device.faults.corrupted = 10_000, times

    @rule()
    def no_more_faults(self) -> None:
        for name, value in vars(Faults()).items():
            setattr(self.device.faults, name, value)

    @invariant()
    def the_ledger_is_exact(self) -> None:
        for tier in self.engine.tiers:
            # Looking at what lingers drops what nobody holds any more.
            lingering = tier.pool.lingering_bytes
            there = tier.pool.used_bytes + tier.pool.cached_bytes + lingering
            assert memory.bytes_of_weights(tier.ledger, tier.place) == there
        assert self.residency.ledger.reserved(self.device.name) == 0
        assert memory.bytes_of_weights(self.residency.ledger, self.device.name) == self.device.allocated()

    def teardown(self) -> None:
        self.no_more_faults()
        self.residency.planner.before_planning = self.follow
        self.generate("a", 1)
        self.engine.close()
        assert self.device.allocated() == 0
        assert self.residency.ledger.stored(HOST) == 0
        self.device.close()


def run(count: int, steps: int) -> None:
    run_state_machine_as_test(
        Generating, settings=settings(max_examples=count, stateful_step_count=steps, deadline=None, print_blob=True)
    )


def test_sequences_of_generations_give_right_pixels() -> None:
    run(times(2, 10), 6)


@pytest.mark.proof
def test_sequences_of_generations_give_right_pixels_proof() -> None:
    run(int(os.environ.get("SAFELIGHT_GENERATIONS", "100")), 6)
