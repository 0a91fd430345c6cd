"""The ring: what is held stays, whatever is asked for meanwhile."""

from __future__ import annotations

from pathlib import Path

import torch
from support import memory

from safelight.devices.cpu import CPU
from safelight.devices.pool import SlabPool
from safelight.memory.account import LedgerRecorder
from safelight.memory.budget import HOST, Ledger
from safelight.memory.ring import Ring
from safelight.memory.segments import split_into_segments
from safelight.memory.source import FileSource


def test_a_slab_that_is_held_is_not_filled_again(tiny: Path) -> None:
    """One slot, and it is held: another segment gets a slot of its own."""
    component = memory.manifest(tiny / "a.safetensors").component("unet")
    with FileSource(1).open(component, torch.float32) as fetcher:
        ledger = Ledger({HOST: memory.PLENTY})
        ring = Ring(
            SlabPool(CPU(), LedgerRecorder(ledger, HOST, None)),
            fetcher.fetch,
            split_into_segments(component, torch.float32),
            1,
            0,
            1,
            "unet",
        )
        with ring.slab_of(0) as slab:
            before = slab.base.clone()
            with ring.use_tensors(1), ring.use_tensors(2):
                assert torch.equal(slab.base, before)
        ring.close()
