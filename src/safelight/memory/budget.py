"""The ledger: how many bytes may be used in each place, and who uses how many for what. No torch, no I/O.

*Stored* bytes are those of storages that live: they are charged when a storage is made and credited when it dies, so
that the ledger equals what there is. *Reserved* bytes are promised to a computation (its working memory): nobody stores
them, but nobody else may have them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

HOST = "host"
"""The place of the host's memory. A device with memory of its own is a place by its name."""


class OverBudget(MemoryError):
    """A charge would pass the budget: ``needed`` bytes were asked for, ``free`` can be had."""

    def __init__(self, place: str, needed: int, free: int) -> None:
        super().__init__(f"{place}: {needed} bytes are over the {free} that are free")
        self.place, self.needed, self.free = place, needed, free


@dataclass(frozen=True, slots=True)
class Entry:
    """``nbytes`` bytes in ``place``. ``owner``: whose they are; ``reason``: what for. ``stored``: a storage lives."""

    place: str
    nbytes: int
    owner: str
    reason: str
    stored: bool


class Ledger:
    """Budgets and entries. Safe to be used by several threads.

    Charging within the budget is one atomic step. A budget may be set below what is used: then nothing more is charged
    until enough was credited.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._budgets = dict(budgets)
        self._entries: dict[int, Entry] = {}
        self._peaks = dict.fromkeys(self._budgets, 0)
        self._next = 0
        self._lock = threading.RLock()

    def budget(self, place: str) -> int:
        return self._budgets[place]

    def set_budget(self, place: str, nbytes: int) -> None:
        with self._lock:
            self._budgets[place] = max(0, nbytes)

    def places(self) -> tuple[str, ...]:
        return tuple(self._budgets)

    def stored(self, place: str) -> int:
        """Bytes of storages that live in ``place``."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.place == place and entry.stored)

    def reserved(self, place: str) -> int:
        """Bytes that are promised in ``place`` to what computes."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.place == place and not entry.stored)

    def free(self, place: str) -> int:
        """Bytes that can still be charged; negative while more is used than a budget that shrank."""
        with self._lock:
            return self._budgets[place] - self.stored(place) - self.reserved(place)

    def peak(self, place: str) -> int:
        """Most bytes that were ever stored in ``place``."""
        return self._peaks[place]

    def charge(
        self, place: str, nbytes: int, owner: str, reason: str, stored: bool = True, certain: bool = False
    ) -> int:
        """Note that ``owner`` has ``nbytes`` bytes; returns the entry's number. Raises OverBudget, noting nothing.

        ``certain``: they are used whatever the budget says, which then has the less for others.
        """
        with self._lock:
            free = self.free(place)
            if nbytes > free and not certain:
                raise OverBudget(place, nbytes, max(0, free))
            self._next += 1
            self._entries[self._next] = Entry(place, nbytes, owner, reason, stored)
            self._peaks[place] = max(self._peaks[place], self.stored(place))
            return self._next

    def rename(self, number: int, owner: str, reason: str) -> None:
        """The same bytes have another owner now, or serve something else."""
        with self._lock:
            self._entries[number] = replace(self._entries[number], owner=owner, reason=reason)

    def credit(self, number: int) -> None:
        """The storage died, or the promise ended. Each entry is credited once."""
        with self._lock:
            del self._entries[number]

    def entries(self) -> tuple[Entry, ...]:
        with self._lock:
            return tuple(self._entries.values())
