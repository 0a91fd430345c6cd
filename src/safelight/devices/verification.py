"""Decides how often bytes in memory are verified: by a policy, and by its cost. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

Policy = Literal["auto", "always", "first", "sample", "off"]
"""When uses are verified.

- ``always``: each use.
- ``first``: the first use of each thing.
- ``sample``: one use in :data:`SAMPLE`.
- ``off``: never.
- ``auto``: the first use of each thing; later uses as long as verifying takes at most :data:`SHARE` of the computing
  time; each use after any error was found.
"""

SAMPLE = 16

SHARE = 0.02


class Verification:
    """Decides whether a use is verified, and counts. Thread-safe."""

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
        """Count a use of ``what``, and return whether to verify it."""
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
        """Count the time within the context as verifying time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - start

    def add_computing_time(self, seconds: float) -> None:
        """Add seconds of computing time."""
        with self._lock:
            self._work += seconds

    def found_wrong(self) -> None:
        with self._lock:
            self.wrong += 1

    def describe(self) -> str:
        """Describe the policy, the counts and the cost, for reports."""
        cost = f", {self._seconds / self._work:.1%} of the time" if self._work else ""
        return f"{self.policy}: {self.verified} of {self.uses} verified{cost}, {self.wrong} found wrong"
