"""Budgets that follow the machine: what is free now, what others take meanwhile, what settings allow. No torch.

The budget of a place is what is stored there now, plus what is used for computing now, plus what can still be had, less
a reserve. It is looked at before every plan. It shrinks at once and grows only by a step worth moving bytes for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from safelight.devices.machine import Bound
from safelight.memory.budget import Ledger

RESERVE_SHARE = 0.05
"""Of what could be had in all: left to the system's caches and to what nobody counts."""

HOST_RESERVE = 64 << 20
"""Bytes. Python, the libraries and the allocator's rounding grow a little while they work."""

GROWTH = 1.05
"""The budget grows only when it would by this factor, so that it does not follow every breath of the machine."""

GB = 1 << 30


@dataclass
class Limits:
    """Keeps the ledger's budget for ``place`` at what can be had.

    ``bound``: what can still be had, and what says so. ``computing``: bytes that this process uses in the place beside
    those stored. ``least_reserve``: bytes that are left alone at least.
    """

    ledger: Ledger
    place: str
    bound: Callable[[], Bound]
    computing: Callable[[], int]
    least_reserve: int = 0
    source: str = field(init=False, default="")

    def follow(self) -> None:
        """Look at the machine and set the budget."""
        bound = self.bound()
        had = bound.available + self.ledger.stored(self.place) + self.computing()
        budget = max(0, had - max(self.least_reserve, int(had * RESERVE_SHARE)))
        now = self.ledger.budget(self.place)
        if budget < now or budget > now * GROWTH:
            self.ledger.set_budget(self.place, budget)
            self.source = bound.source
