"""Self-test of a device's copies on this machine. It runs once per device, driver and torch version.

It measures whether copies may be asynchronous, and which size of staging buffers is best. It starts several copies of
each size at once. Meanwhile it drops their sources and allocates new memory, which is how other programs lost bytes
(row COPY 01 of docs/corruption.md). Then it compares the sums of targets and sources. The result is stored.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from safelight.devices import choice, measurements, sums
from safelight.devices.base import Device, free_cache
from safelight.devices.transfer import Transfers
from safelight.devices.verification import Verification
from safelight.logs import Log

_log = Log(__name__)

SIZES = (1, 4097, 1 << 16, (1 << 20) + 64, 1 << 24)
"""Sizes in bytes of the copies that the test makes."""

AT_ONCE = 6
"""How many copies of one size run at the same time."""

ROUNDS = 3

BUFFER_SIZES = (1 << 20, 1 << 22, 1 << 23, 1 << 24, 1 << 25)
"""Sizes in bytes of the staging buffers that the test compares."""

TIMED_BYTES = 1 << 26

MAX_SLOWDOWN = 1.05
"""The test chooses the smallest buffer size that takes at most this factor of the best time."""


@dataclass(frozen=True, slots=True)
class CopyTestResult:
    """The test's result.

    ``asynchronous``: whether asynchronous copies were correct.
    ``why``: the finding, as text.
    ``stage_bytes``: bytes of each staging buffer, 0 for no buffers.
    """

    asynchronous: bool
    why: str
    stage_bytes: int


def copy_test_result(device: Device, folder: Path) -> CopyTestResult:
    """Return the result that is stored in ``devices.json`` of ``folder``, or run the test and store its result.

    Sets ``device.asynchronous``.
    """
    path = folder / "devices.json"
    key = f"{device.name}, {choice.hardware(device)}, torch {torch.__version__}"
    try:
        found = CopyTestResult(**measurements.read(path, key))
    except TypeError:
        found = run_test(device)
        _log.debug("tested the device's copies", device=device.name, **asdict(found))
        measurements.keep(path, key, asdict(found))
    device.asynchronous = found.asynchronous
    return found


def run_test(device: Device) -> CopyTestResult:
    """Run the test. It takes less than a second. Sets ``device.asynchronous``. Its memory is returned to the system."""
    device.asynchronous = True
    wrong = _first_wrong(device)
    device.asynchronous = wrong is None
    why = "copies of all sizes arrived unchanged" if wrong is None else wrong
    stage_bytes = _best_buffer_size(device) if device.staging_buffer_bytes else 0
    # torch's cache of page-locked memory would keep all tested buffers.
    free_cache(device)
    return CopyTestResult(device.asynchronous, why, stage_bytes)


def _random_bytes(nbytes: int, generator: torch.Generator) -> torch.Tensor:
    # Eight bytes of a random number take half the time of eight random numbers.
    numbers = torch.empty(-(-nbytes // 8), dtype=torch.int64, device="cpu").random_(generator=generator)
    return numbers.view(torch.uint8)[:nbytes]


def _first_wrong(device: Device) -> str | None:
    """Describe the first copy that arrived corrupted, or return None."""
    generator = torch.Generator().manual_seed(0)
    sizes = [nbytes for nbytes in SIZES if nbytes * AT_ONCE <= device.available()]
    for nbytes in sizes * ROUNDS:
        base = device.allocate(nbytes * AT_ONCE)
        # Work on an earlier tensor with these bytes may not be done.
        device.record_fence().wait()
        try:
            targets = [base[n * nbytes : (n + 1) * nbytes] for n in range(AT_ONCE)]
            # From the memory that real copies come from.
            sources = [device.staging(nbytes).copy_(_random_bytes(nbytes, generator)) for _ in targets]
            sent = [sums.compute_sum(source) for source in sources]
            fences = [device.push(source, target) for source, target in zip(sources, targets, strict=True)]
            # The fences keep the sources alive, so new memory must not overlap them.
            sources.clear()
            others = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cpu") for _ in targets]
            for fence in fences:
                fence.wait()
            arrived = [sums.compute_sum(target) for target in targets]
            del others, targets
            if arrived != sent:
                return f"an asynchronous copy of {nbytes} bytes arrived corrupted"
        finally:
            device.record_fence().wait()
            device.release(base)
    return None


def _best_buffer_size(device: Device) -> int:
    """Return the smallest buffer size that copies about as fast as the best one."""
    nbytes = min(TIMED_BYTES, device.available() // 2)
    source, base = torch.zeros(nbytes, dtype=torch.uint8, device="cpu"), device.allocate(nbytes)
    seconds: dict[int, float] = {}
    for size in BUFFER_SIZES:
        transfers = Transfers(device, Verification("off"), size)
        for _ in range(3):
            start = time.perf_counter()
            transfers.push("the self-test", source, base, verify=False)
            seconds[size] = min(seconds.get(size, 1e9), time.perf_counter() - start)
    device.release(base)
    return min(size for size in BUFFER_SIZES if seconds[size] <= min(seconds.values()) * MAX_SLOWDOWN)
