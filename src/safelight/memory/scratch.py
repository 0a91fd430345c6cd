"""A temporary file for segments with overlays (LoRA etc.) applied.

The overlays of a streamed segment are computed at its first two uses. The second result is stored, and later uses read
it back.

The file has no name, so it never outlives the process. It only saves time: if it cannot be written (for example, the
disk is full), the segments are computed again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

import torch

from safelight.logs import Log

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = Log(__name__)


class Scratch:
    """Stores segments on disk by index, for as long as the context lasts.

    ``folder``: where to create the file, None for the system's temporary folder.
    """

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
        """Store the bytes (uint8, host) of segment ``index`` if they are offered for the second time.

        The second offer shows that the segment is streamed and will be needed again. If the disk has no room, nothing
        is stored.
        """
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
            _log.warning("cannot write a scratch file; overlays are computed again at each use", why=str(error))
            return
        self._places[index] = self._end, finished.numel()
        self._end = at

    def read(self, index: int, into: torch.Tensor) -> bool:
        """Fill ``into`` (uint8, host) with the stored bytes of segment ``index``.

        Returns False if the segment is not stored or cannot be read completely.
        """
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
