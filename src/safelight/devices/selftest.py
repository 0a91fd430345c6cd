"""What this machine's device can be trusted with: measured on it, once for its versions, and kept.

Copies: whether they may be asynchronous, and how large the buffers should be through which they go. Copies of several
sizes are under way at once, the program lets go of their sources and uses new memory meanwhile (which is how others
lost bytes: row COPY 01), and what arrived is summed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
import torch

from safelight.devices import choice, kept, sums
from safelight.devices.base import Device
from safelight.devices.transfer import Transfers
from safelight.devices.verification import Verification

_log = structlog.get_logger(__name__)

SIZES = (1, 4097, 1 << 16, (1 << 20) + 64, 1 << 24)
"""Bytes of the copies that are tried."""

AT_ONCE = 6
"""Copies of one size that are under way together."""

ROUNDS = 3

STAGES = (1 << 20, 1 << 22, 1 << 23, 1 << 24, 1 << 25)
"""Bytes: the sizes of buffers that are tried."""

TIMED_BYTES = 1 << 26

ENOUGH = 1.05
"""The smallest buffers are taken that are at most so much slower than the best."""


@dataclass(frozen=True, slots=True)
class Copies:
    """``asynchronous``: they were sound. ``why``: what was seen. ``stage_bytes``: of each buffer, 0 for none."""

    asynchronous: bool
    why: str
    stage_bytes: int


def copies(device: Device, folder: Path) -> Copies:
    """What is known of this device's copies in ``devices.json`` of ``folder``, else what trying them shows.

    Sets ``device.asynchronous``.
    """
    path = folder / "devices.json"
    key = f"{device.name}, {choice.hardware(device)}, torch {torch.__version__}"
    try:
        found = Copies(**kept.read(path, key))
    except TypeError:
        found = tried(device)
        _log.debug("the device's copies were tried", device=device.name, **asdict(found))
        kept.keep(path, key, asdict(found))
    device.asynchronous = found.asynchronous
    return found


def tried(device: Device) -> Copies:
    """Try the device's copies. It takes under a second."""
    device.asynchronous = True
    wrong = _first_wrong(device)
    device.asynchronous = wrong is None
    why = "copies of all sizes arrived as they were sent" if wrong is None else wrong
    return Copies(device.asynchronous, why, _best_stage(device) if device.stage_bytes else 0)


def _first_wrong(device: Device) -> str | None:
    """What the first copy was that arrived otherwise than it was sent."""
    generator = torch.Generator().manual_seed(0)
    sizes = [nbytes for nbytes in SIZES if nbytes * AT_ONCE <= device.available()]
    for nbytes in sizes * ROUNDS:
        base = device.allocate(nbytes * AT_ONCE)
        try:
            targets = [base[n * nbytes : (n + 1) * nbytes] for n in range(AT_ONCE)]
            sources = [torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator) for _ in targets]
            sent = [sums.of(source) for source in sources]
            fences = [device.push(source, target) for source, target in zip(sources, targets, strict=True)]
            # The fences keep the sources; memory that the program asks for now must not be theirs.
            sources.clear()
            others = [torch.full((nbytes,), 0xFF, dtype=torch.uint8) for _ in targets]
            for fence in fences:
                fence.wait()
            arrived = [sums.of(target) for target in targets]
            del others, targets
            if arrived != sent:
                return f"an asynchronous copy of {nbytes} bytes arrived otherwise than it was sent"
        finally:
            device.mark().wait()
            device.release(base)
    return None


def _best_stage(device: Device) -> int:
    """The smallest size of two buffers that copies about as fast as the best."""
    nbytes = min(TIMED_BYTES, device.available() // 2)
    source, base = torch.zeros(nbytes, dtype=torch.uint8), device.allocate(nbytes)
    seconds: dict[int, float] = {}
    for size in STAGES:
        transfers = Transfers(device, Verification("off"), size)
        for _ in range(3):
            start = time.perf_counter()
            transfers.push("the self-test", source, base, verify=False)
            seconds[size] = min(seconds.get(size, 1e9), time.perf_counter() - start)
    device.release(base)
    return min(size for size in STAGES if seconds[size] <= min(seconds.values()) * ENOUGH)
