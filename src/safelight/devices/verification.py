"""How often bytes in memory are summed again: by policy, and by what it may cost. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

Policy = Literal["auto", "always", "first", "sample", "off"]
"""``always``; the ``first`` time of each thing; one time in :data:`SAMPLE`; ``off``; ``auto``: every time, as long as
that costs less than :data:`SHARE` of the time that computing takes, and always once anything was found wrong."""

SAMPLE = 16

SHARE = 0.02


class Verification:
    """Says whether the next use is verified, and counts. Safe to be used by several threads."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.uses = 0
        self.verified = 0
        self.wrong = 0
        self._seconds = 0.0
        self._work = 0.0
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def due(self, what: str) -> bool:
        """Whether this use of ``what`` is verified."""
        with self._lock:
            first = what not in self._known
            self._known.add(what)
            self.uses += 1
            due = {
                "always": True,
                "first": first,
                "sample": self.uses % SAMPLE == 1,
                "off": False,
                "auto": first or bool(self.wrong) or self._seconds <= SHARE * self._work,
            }[self.policy]
            self.verified += due
            return due

    @contextmanager
    def timed(self) -> Generator[None]:
        """The time within was spent on verifying."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - start

    def worked(self, seconds: float) -> None:
        """So much time was spent on what is verified."""
        with self._lock:
            self._work += seconds

    def found_wrong(self) -> None:
        with self._lock:
            self.wrong += 1

    def says(self) -> str:
        """For people: what is verified, and what that costs."""
        cost = f", {self._seconds / self._work:.1%} of the time" if self._work else ""
        return f"{self.policy}: {self.verified} of {self.uses} verified{cost}, {self.wrong} found wrong"
