"""Tests of interrupts during an import."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from safelight.cli import interrupts

MODULE = """\
import signal, time
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep({seconds})
    interrupted = False
except BaseException:
    interrupted = True
"""
"""Suppresses every exception, like PyTorch while it starts."""


@pytest.fixture
def default_interrupts() -> Generator[None]:
    # If a script runs the tests in the background, they ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Import a module, and return whether it was interrupted."""
    interrupted: list[bool] = []
    (folder / "interrupted_module.py").write_text(MODULE.format(seconds=3 * interrupts.AGAIN_SECONDS))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "interrupted_module", raising=False)
    try:
        with interrupts.wait_for_imports():
            interrupted.append(importlib.import_module("interrupted_module").interrupted)
            time.sleep(60)
    except KeyboardInterrupt:
        interrupted.append(True)
    return interrupted


@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupt_during_an_import_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alarm = signal.getsignal(signal.SIGALRM)
    assert _import(tmp_path, monkeypatch) == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (alarm, (0, 0))


@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupt_elsewhere_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.wait_for_imports():
        signal.raise_signal(signal.SIGINT)


class Interrupted:
    """An interrupt comes within its finalizer, and Python suppresses it there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def _collect_it(after: list[str]) -> None:
    with interrupts.wait_for_imports():
        Interrupted()
        after.append("the finalizer")
        time.sleep(60)


@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupt_within_a_finalizer_comes_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    after: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _collect_it(after)
    assert (after, capsys.readouterr().err) == (["the finalizer"], "")


@pytest.mark.usefixtures("default_interrupts")
def test_a_command_that_runs_during_an_import_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "command_module.py").write_text(
        "import signal\n"
        "from safelight.cli.interrupts import wait_for_imports\n"
        "with wait_for_imports():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("command_module")


def test_ignored_interrupts_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.wait_for_imports():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
