"""The engine of one process: which progress messages contain a report of the memory."""

from __future__ import annotations

import time

import pytest

from safelight.workers import local_engine
from safelight.workers.local_engine import SpacedReports


def test_a_report_of_the_memory_does_not_follow_another_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    report = SpacedReports(lambda: {"at": now})
    assert report() == {"at": 100.0}
    now += local_engine.REPORT_SECONDS / 2
    assert report() is None
    now += local_engine.REPORT_SECONDS
    assert report() == {"at": now}
