"""The ledger: each place's budget in bytes, and who uses how many of them for what. No torch, no I/O.

*Stored* bytes belong to live storages. They are charged when a storage is created and credited when it is freed, so
the ledger matches the real allocations. *Reserved* bytes are promised to a computation as its working memory. They are
not allocated yet, but nobody else may use them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

HOST = "host"
"""The name of host memory as a place. A device with its own memory is a place named after the device."""


class OverBudget(MemoryError):
    """A charge would exceed the budget: it needs ``needed`` bytes, and ``free`` bytes are available."""

    def __init__(self, place: str, needed: int, free: int) -> None:
        super().__init__(f"{place}: {needed} bytes exceed the {free} free bytes")
        self.place, self.needed, self.free = place, needed, free


@dataclass(frozen=True, slots=True)
class Entry:
    """``nbytes`` bytes in ``place``, used by ``owner`` for ``reason``.

    ``stored``: True for a live storage, False for a promise to a computation.
    """

    place: str
    nbytes: int
    owner: str
    reason: str
    stored: bool


class Ledger:
    """Budgets and entries. Thread-safe.

    Checking the budget and charging is one atomic step. A budget may be set below the bytes in use. Then every charge
    fails until enough bytes are credited.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._budgets = dict(budgets)
        self._entries: dict[int, Entry] = {}
        self._peaks = dict.fromkeys(self._budgets, 0)
        self._changes = dict.fromkeys(self._budgets, 0)
        self._next = 0
        self._lock = threading.RLock()

    def budget(self, place: str) -> int:
        return self._budgets[place]

    def set_budget(self, place: str, nbytes: int) -> None:
        with self._lock:
            self._budgets[place] = max(0, nbytes)

    def places(self) -> tuple[str, ...]:
        return tuple(self._budgets)

    def stored(self, place: str, besides: str | None = None) -> int:
        """Bytes of live storages in ``place``. ``besides``: a reason whose entries do not count."""
        with self._lock:
            live = (entry for entry in self._entries.values() if entry.place == place and entry.stored)
            return sum(entry.nbytes for entry in live if entry.reason != besides)

    def reserved(self, place: str) -> int:
        """Bytes promised to computations in ``place``."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.place == place and not entry.stored)

    def free(self, place: str) -> int:
        """Bytes that can still be charged. Negative if the budget shrank below the bytes in use."""
        with self._lock:
            return self._budgets[place] - self.stored(place) - self.reserved(place)

    def peak(self, place: str) -> int:
        """The highest number of bytes ever stored in ``place``."""
        return self._peaks[place]

    def changes(self, place: str) -> int:
        """How often storages were created or freed in ``place``. While it stays the same, so do the stored bytes."""
        with self._lock:
            return self._changes[place]

    def charge(
        self, place: str, nbytes: int, owner: str, reason: str, stored: bool = True, already_used: bool = False
    ) -> int:
        """Record that ``owner`` uses ``nbytes`` bytes, and return the entry's number.

        ``already_used``: record the bytes even if they exceed the budget, because they are in use already.
        Raises OverBudget, and records nothing, if the budget is too small.
        """
        with self._lock:
            free = self.free(place)
            if nbytes > free and not already_used:
                raise OverBudget(place, nbytes, max(0, free))
            self._next += 1
            self._entries[self._next] = Entry(place, nbytes, owner, reason, stored)
            self._peaks[place] = max(self._peaks[place], self.stored(place))
            self._changes[place] += stored
            return self._next

    def rename(self, number: int, owner: str, reason: str) -> None:
        """Give an entry another owner and reason. Its bytes stay the same."""
        with self._lock:
            self._entries[number] = replace(self._entries[number], owner=owner, reason=reason)

    def credit(self, number: int) -> None:
        """Remove an entry: its storage was freed, or its promise ended. Call it once for each entry."""
        with self._lock:
            entry = self._entries.pop(number)
            self._changes[entry.place] += entry.stored

    def entries(self) -> tuple[Entry, ...]:
        with self._lock:
            return tuple(self._entries.values())
