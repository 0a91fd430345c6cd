"""How much memory computing takes beside the weights: measured, kept, and corrected by each run. No torch.

The first time that a component runs at a size, in a dtype and with an attention, its need is estimated from shapes;
from then on it is known. Kept as JSON in the library's folder, so that the next process knows it too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from safelight.errors import CorruptFileError, FileError
from safelight.files import write_whole
from safelight.formats.folder import read_json

_log = structlog.get_logger(__name__)

MARGIN = 1.1
"""Of a measured need: the next run may find memory in other pieces."""

LEAST = 16 << 20
"""Bytes added to every estimate: libraries keep buffers of their own."""

FORGETTING = 0.25
"""A run that needed less moves the record by this share of the difference; one that needed more sets it at once."""

EVERY_SECONDS = 0.004
"""Between two looks at the memory in use; the large tensors of a forward pass live for longer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed. ``name``: component, widths, dtype, attention and device in one text. ``pixels``: of the image.

    ``guess``: bytes, from shapes, for as long as nothing was measured. ``quadratic``: whether the need grows with the
    square of the pixels (attention that holds all scores), else with the pixels.
    """

    name: str
    pixels: int
    guess: int
    quadratic: bool = False


class WorkingMemory:
    """Estimates by what was measured. ``path``: the file in which it is kept, None to keep it in this process only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._measured: dict[str, dict[int, int]] = {}
        if path is not None:
            self._measured = _kept(path)

    def estimate(self, work: Work) -> int:
        """Bytes to promise for ``work``."""
        with self._lock:
            known = self._measured.get(work.name, {})
        if work.pixels in known:
            return int(known[work.pixels] * MARGIN) + LEAST
        if not known:
            return work.guess + LEAST
        nearest = min(known, key=lambda pixels: abs(pixels - work.pixels))
        grown = max(1.0, work.pixels / nearest) ** (2 if work.quadratic else 1)
        return int(known[nearest] * grown * MARGIN) + LEAST

    def knows(self, work: Work) -> bool:
        """Whether this component was measured, at whatever size."""
        with self._lock:
            return work.name in self._measured

    def learn(self, work: Work, nbytes: int) -> None:
        """Correct the record by what a run took."""
        with self._lock:
            known = self._measured.setdefault(work.name, {})
            before = known.get(work.pixels)
            after = nbytes if before is None or nbytes > before else int(before + (nbytes - before) * FORGETTING)
            if after == before:
                return
            known[work.pixels] = after
            if self._path is not None and (before is None or abs(after - before) > before * 0.02):
                text = {name: {str(p): n for p, n in sizes.items()} for name, sizes in self._measured.items()}
                try:
                    write_whole(self._path, json.dumps(text, indent=1, sort_keys=True).encode())
                except FileError as error:
                    # It is known to this process; the image matters more than the next process's estimate.
                    _log.warning("what computing took cannot be kept", why=str(error))

    def too_little(self, work: Work) -> None:
        """Memory ran out within the estimate: promise half as much again next time."""
        self.learn(work, int(self.estimate(work) * 1.5))


def _kept(path: Path) -> dict[str, dict[int, int]]:
    """What was measured by earlier processes. A damaged file is as good as none: it is measured again."""
    if not path.exists():
        return {}
    try:
        values: dict[str, Any] = read_json(path)
        return {str(name): {int(p): int(n) for p, n in sizes.items()} for name, sizes in values.items()}
    except (CorruptFileError, FileError, ValueError, TypeError, AttributeError):
        return {}


@contextmanager
def watched(used: Callable[[], int]) -> Generator[Callable[[], int]]:
    """Within the context ``used`` is looked at again and again; the function given says the most beyond the start."""
    start = used()
    most = start
    stop = threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.wait(EVERY_SECONDS):
            most = max(most, used())

    watcher = threading.Thread(target=look, name="safelight-memory", daemon=True)
    watcher.start()
    try:
        yield lambda: max(0, most - start)
    finally:
        stop.set()
        watcher.join()
