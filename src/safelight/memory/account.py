"""Charges to the ledger what a pool allocates, and what modules hold besides their weights."""

from __future__ import annotations

import threading
import weakref
from collections import deque

from safelight.devices.pool import AllocationRecorder
from safelight.memory.budget import Ledger, OverBudget

BUFFERS = "buffers and caches of a module"
"""The ledger's reason for tensors that are no weights."""


class LedgerRecorder(AllocationRecorder):
    """Records a pool's allocations as ledger entries, at most ``max_bytes`` bytes in total (None: no limit)."""

    def __init__(self, ledger: Ledger, place: str, max_bytes: int | None) -> None:
        self._ledger = ledger
        self._place = place
        self._max_bytes = max_bytes
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def charge(self, nbytes: int, owner: str, reason: str, over_budget: bool = False) -> int:
        with self._lock:
            free = None if self._max_bytes is None else self._max_bytes - sum(self._sizes.values())
            if free is not None and nbytes > free and not over_budget:
                raise OverBudget(self._place, nbytes, max(0, free))
            number = self._ledger.charge(self._place, nbytes, owner, reason, already_used=over_budget)
            self._sizes[number] = nbytes
            return number

    def rename(self, number: int, owner: str, reason: str) -> None:
        self._ledger.rename(number, owner, reason)

    def credit(self, number: int) -> None:
        with self._lock:
            del self._sizes[number]
            self._ledger.credit(number)


class BufferAccount:
    """Charges the tensors that belong to an object, for as long as the object lives.

    An object may die anywhere, also while the ledger is in use, so its bytes are credited at the next use of the
    account.
    """

    def __init__(self, ledger: Ledger, place: str) -> None:
        self._ledger = ledger
        self._place = place
        self._dead: deque[int] = deque()

    def charge(self, holder: object, nbytes: int, owner: str) -> None:
        """Record that ``holder`` has tensors of ``nbytes`` bytes. ``owner``: its name in the ledger."""
        self.settle()
        if nbytes:
            number = self._ledger.charge(self._place, nbytes, owner, BUFFERS, already_used=True)
            weakref.finalize(holder, self._dead.append, number)

    def settle(self) -> None:
        """Credit the bytes of the objects that died."""
        while self._dead:
            self._ledger.credit(self._dead.popleft())
