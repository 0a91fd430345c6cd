"""Charges a pool's allocations to the ledger."""

from __future__ import annotations

import threading

from safelight.devices.pool import AllocationRecorder
from safelight.memory.budget import Ledger, OverBudget


class LedgerRecorder(AllocationRecorder):
    """Records a pool's allocations as ledger entries, at most ``max_bytes`` bytes in total (None: no limit)."""

    def __init__(self, ledger: Ledger, place: str, max_bytes: int | None) -> None:
        self._ledger = ledger
        self._place = place
        self._max_bytes = max_bytes
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def charge(self, nbytes: int, owner: str, reason: str) -> int:
        with self._lock:
            free = None if self._max_bytes is None else self._max_bytes - sum(self._sizes.values())
            if free is not None and nbytes > free:
                raise OverBudget(self._place, nbytes, max(0, free))
            number = self._ledger.charge(self._place, nbytes, owner, reason)
            self._sizes[number] = nbytes
            return number

    def rename(self, number: int, owner: str, reason: str) -> None:
        self._ledger.rename(number, owner, reason)

    def credit(self, number: int) -> None:
        with self._lock:
            del self._sizes[number]
            self._ledger.credit(number)
