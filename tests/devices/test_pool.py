"""Slabs: what nobody needs any more is given back before memory is said to have run out."""

from __future__ import annotations

import pytest

from safelight.devices.pool import SlabPool
from safelight.devices.simulated import simulated
from safelight.errors import OutOfMemoryError


def test_what_only_a_circle_holds_makes_room() -> None:
    with simulated(nbytes=1 << 16) as device:
        pool = SlabPool(device)
        slab = pool.take(1 << 16)
        circle: list[object] = [slab.base[:64]]
        circle.append(circle)
        assert not pool.give(slab)
        with pytest.raises(OutOfMemoryError):
            pool.take(1 << 16)
        del circle, slab
        assert pool.take(1 << 16).nbytes == 1 << 16
