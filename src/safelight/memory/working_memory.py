"""Working memory, which is what computing uses beside the weights: measured, stored, corrected by each run. No torch.

Before a component runs for the first time with a given image size, dtype and attention, its need is estimated from
shapes. After that, it is measured. The measurements are stored as JSON in the library's folder, for later processes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import CorruptFileError, FileError
from safelight.files.disk import write_whole
from safelight.files.folder import read_json
from safelight.logs import Log

if TYPE_CHECKING:
    from safelight.devices.base import CountsPeak

_log = Log(__name__)

MARGIN = 1.1
"""A measured need is multiplied by this, because memory may be more fragmented at the next run."""

FIXED_BYTES = 16 << 20
"""Bytes added to every estimate, for the buffers of libraries."""

DECAY = 0.25
"""A run that needed less lowers the record by this share of the difference. One that needed more replaces it."""

POLL_SECONDS = 0.004
"""Seconds between two readings of the memory in use. The large tensors of a forward pass live longer than this."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A computation whose memory is estimated.

    ``name``: component, widths, dtype, attention and device in one text.
    ``pixels``: number of pixels of the image.
    ``guess``: bytes computed from shapes, used until a run is measured.
    ``quadratic``: the need grows with the square of the pixels (attention that stores all scores). If False, it grows
    linearly.
    """

    name: str
    pixels: int
    guess: int
    quadratic: bool = False


class WorkingMemoryEstimator:
    """Estimates the working memory from measured runs.

    ``path``: the file that stores the measurements; None to store them in this process only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._measured: dict[str, dict[int, int]] = {}
        if path is not None:
            self._measured = _read_records(path)

    def estimate(self, workload: Workload) -> int:
        """Return the bytes to reserve for ``workload``."""
        with self._lock:
            known = self._measured.get(workload.name, {})
        if workload.pixels in known:
            return int(known[workload.pixels] * MARGIN) + FIXED_BYTES
        if not known:
            return workload.guess + FIXED_BYTES
        nearest = min(known, key=lambda pixels: abs(pixels - workload.pixels))
        grown = max(1.0, workload.pixels / nearest) ** (2 if workload.quadratic else 1)
        return int(known[nearest] * grown * MARGIN) + FIXED_BYTES

    def knows(self, workload: Workload) -> bool:
        """Whether this component was measured at any size."""
        with self._lock:
            return workload.name in self._measured

    def learn(self, workload: Workload, nbytes: int) -> None:
        """Correct the record with ``nbytes``, the bytes that a run used."""
        with self._lock:
            known = self._measured.setdefault(workload.name, {})
            before = known.get(workload.pixels)
            after = nbytes if before is None or nbytes > before else int(before + (nbytes - before) * DECAY)
            if after == before:
                return
            known[workload.pixels] = after
            if self._path is None or (before is not None and abs(after - before) <= before * 0.02):
                return
            values = {name: {str(p): n for p, n in sizes.items()} for name, sizes in self._measured.items()}
        try:
            # If power is lost, the need is measured again, so no image waits for the disk.
            write_whole(self._path, json.dumps(values, indent=1, sort_keys=True).encode(), wait=False)
        except FileError as error:
            # This process has the record. The image matters more than the next process's estimate.
            _log.warning("cannot store the measured working memory", why=str(error))

    def record_shortage(self, workload: Workload) -> None:
        """Raise the record by half, after memory ran out within the estimate."""
        self.learn(workload, int(self.estimate(workload) * 1.5))


def _read_records(path: Path) -> dict[str, dict[int, int]]:
    """Read the measurements of earlier processes. A damaged file gives none, and the need is measured again."""
    if not path.exists():
        return {}
    try:
        values: dict[str, Any] = read_json(path)
        return {str(name): {int(p): int(n) for p, n in sizes.items()} for name, sizes in values.items()}
    except (CorruptFileError, FileError, ValueError, TypeError, AttributeError):
        return {}


ReadPeak = Callable[[], int | None]
"""Returns the most bytes that computing used since the measuring began; None if that is unknown."""

MeasurePeak = Callable[[], AbstractContextManager[ReadPeak]]
"""Measures the working memory within a context."""


@contextmanager
def counted_peak(counter: CountsPeak, changes: Callable[[], int]) -> Generator[ReadPeak]:
    """Measure by the allocator's own count of the peak.

    ``changes``: counts how often weights were allocated or freed. If they were, the peak does not say how much of it
    was working memory, so it is unknown.
    """
    before = changes()
    start = counter.reset_peak()
    yield lambda: max(0, counter.peak() - start) if changes() == before else None


@contextmanager
def polled_peak(used: Callable[[], int | None]) -> Generator[ReadPeak]:
    """Measure by polling ``used``, the bytes in use now. The peak is unknown if ``used`` returns None."""
    start = used()
    if start is None:
        yield lambda: None
        return
    most = start
    stop = threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.wait(POLL_SECONDS):
            most = max(most, used() or 0)

    watcher = threading.Thread(target=look, name="safelight-memory", daemon=True)
    watcher.start()
    try:
        yield lambda: max(0, most - start)
    finally:
        stop.set()
        watcher.join()
