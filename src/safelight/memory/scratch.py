"""Finished segments on disk: what was computed once for a lease that streams it is read from then on.

A file without a name, so that nothing of it outlives the process. It saves time only: where it cannot be written (no
room), what would have been in it is computed again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

import structlog
import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = structlog.get_logger(__name__)


class Scratch:
    """A place on disk for segments by their number, for as long as the context lasts. ``folder``: on which disk, None
    for the system's own for such files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._places: dict[int, tuple[int, int]] = {}
        self._offered: set[int] = set()
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def offer(self, index: int, finished: torch.Tensor) -> None:
        """Keep the bytes (uint8, host) of segment ``index`` when they are offered for the second time: then they are
        streamed, and will be wanted again. Nothing happens where the disk has no room for them."""
        if index not in self._offered:
            self._offered.add(index)
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed at the end of the context
            view, at = memoryview(cast("Buffer", finished.numpy())), self._end
            while view:
                written = os.pwrite(self._file.fileno(), view, at)
                view, at = view[written:], at + written
        except OSError as error:
            _log.warning("no scratch on disk; what lies over weights is computed at each use", why=str(error))
            return
        self._places[index] = self._end, finished.numel()
        self._end = at

    def read(self, index: int, into: torch.Tensor) -> bool:
        """Fill ``into`` (uint8, host) with what was kept of segment ``index``; False when nothing was, or not all of it
        can be read."""
        if self._file is None or index not in self._places:
            return False
        begin, size = self._places[index]
        view, at = memoryview(cast("Buffer", into[:size].numpy())), begin
        while view:
            got = os.preadv(self._file.fileno(), [view], at)
            if got == 0:
                return False
            view, at = view[got:], at + got
        return True
