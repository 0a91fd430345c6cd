"""Residencies with a fixed budget, for tests."""

from __future__ import annotations

from pathlib import Path

from safelight.catalog.identify import identify
from safelight.devices.base import Device
from safelight.devices.cpu import CPU
from safelight.devices.transfer import Transfers
from safelight.memory.account import BUFFERS
from safelight.memory.budget import HOST, Ledger
from safelight.memory.host_source import HostSource
from safelight.memory.residency import Residency
from safelight.memory.source import FileSource
from safelight.weights.manifest import Manifest, hash_components

PLENTY = 1 << 30


def host(budget: int = PLENTY, partial: bool = True) -> Residency:
    """A residency in host memory. ``budget``: bytes."""
    return Residency(CPU(), Ledger({HOST: budget}), HOST, FileSource(1), partial)


def on(device: Device, budget: int = PLENTY, host_budget: int = PLENTY, keep: bool = True) -> Residency:
    """A residency on a device that has memory of its own. ``budget``, ``host_budget``: bytes."""
    ledger = Ledger({HOST: host_budget, device.name: budget})
    behind = Residency(CPU(), ledger, HOST, FileSource(1))
    return Residency(device, ledger, device.name, HostSource(behind, Transfers(device), keep))


def bytes_of_weights(ledger: Ledger, place: str) -> int:
    """Bytes that are stored in a place, without the buffers of modules: those are not from a pool of slabs."""
    return sum(one.nbytes for one in ledger.entries() if one.place == place and one.stored and one.reason != BUFFERS)


def tiers(residency: Residency) -> list[Residency]:
    """The residency and, if it is on a device, the host's residency behind it."""
    return [residency, residency.source.host] if isinstance(residency.source, HostSource) else [residency]


def manifest(path: Path) -> Manifest:
    layout = identify(path).layout
    assert layout is not None
    return hash_components(layout.components)
