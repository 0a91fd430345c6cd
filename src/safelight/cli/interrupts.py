"""Makes an interrupt (Ctrl-C, SIGINT) that comes during an import wait until the import has ended.

An exception within the import of a compiled module is not safe. PyTorch suppresses it or ends the process by SIGABRT,
and NumPy cannot be imported a second time. Python itself suppresses an exception within a finalizer (``__del__``); such
an interrupt comes again.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator
from types import FrameType

AGAIN_SECONDS = 0.02
"""How long a waiting interrupt waits before it looks again."""

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


@contextlib.contextmanager
def wait_for_imports() -> Generator[None]:
    """Within the context, raise KeyboardInterrupt only when nothing is imported.

    If the process ignores interrupts or has a handler of its own, nothing changes; nor if the context itself is entered
    during an import, because then an interrupt would wait for its end. Only for the main thread.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or _imports(sys._getframe()):
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    report, sys.unraisablehook = sys.unraisablehook, _again_if_suppressed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _again_if_suppressed(suppressed: sys.UnraisableHookArgs) -> None:
    if issubclass(suppressed.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(suppressed)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A timer of the system, because a handler may not wait for a lock, and to start a thread takes one.
    if _imports(frame):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        return
    signal.default_int_handler(number, frame)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False
