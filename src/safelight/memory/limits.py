"""Memory budgets that follow the machine: its free memory, other processes' use, and the settings. No torch.

The budget of a place is the bytes stored there, plus the bytes that computing uses there, plus the bytes still
available, minus a reserve. It is updated before every plan. It shrinks at once. It grows only by at least 5 %; less
is not worth loading weights for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from safelight.devices.machine import MemoryLimit
from safelight.memory.budget import Ledger

RESERVE_SHARE = 0.05
"""Share of all memory that this process could use. It is left to the system's caches and to uncounted allocations."""

HOST_RESERVE = 64 << 20
"""Bytes. Python, the libraries and the allocator's rounding grow a little while they work."""

GROWTH = 1.05
"""The budget grows only if it would grow by at least this factor, so that it ignores small fluctuations."""

GB = 1 << 30


@dataclass
class BudgetUpdater:
    """Sets the ledger's budget for ``place`` to the memory that is available.

    ``read_available``: returns the bytes still available and the source of that limit.
    ``used_working_bytes``: returns the bytes that this process uses in the place beyond the stored ones.
    ``least_reserve``: minimum reserve in bytes.
    ``promised_elsewhere``: returns the bytes of the same memory that are promised in another place but still look
    available, see :func:`count_once`.
    """

    ledger: Ledger
    place: str
    read_available: Callable[[], MemoryLimit]
    used_working_bytes: Callable[[], int]
    least_reserve: int = 0
    promised_elsewhere: Callable[[], int] = lambda: 0
    source: str = field(init=False, default="")

    def unused_promises(self) -> int:
        """Return the bytes that are promised to computations in this place and that they do not use yet."""
        return max(0, self.ledger.reserved(self.place) - self.used_working_bytes())

    def update_budget(self) -> None:
        """Read the machine's available memory and set the budget."""
        limit = self.read_available()
        available = limit.available - self.promised_elsewhere()
        usable = available + self.ledger.stored(self.place) + self.used_working_bytes()
        budget = max(0, usable - max(self.least_reserve, int(usable * RESERVE_SHARE)))
        now = self.ledger.budget(self.place)
        if budget < now or budget > now * GROWTH:
            self.ledger.set_budget(self.place, budget)
            self.source = limit.source


def count_once(one: BudgetUpdater, other: BudgetUpdater) -> None:
    """Make two places share one memory: what one of them promised to a computation is no longer available to the other.

    Stored bytes need nothing more: they are not available any more, in both places.
    """
    one.promised_elsewhere = other.unused_promises
    other.promised_elsewhere = one.unused_promises
