"""Sources of a segment's bytes and how to verify them, and the source that reads files.

A segment's checksums are computed when its bytes are produced. Computing them again from the bytes in memory verifies
the bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from safelight.devices.pool import Slab
from safelight.devices.transfer import checksum_of, read_all, torch_threads
from safelight.errors import IntegrityError
from safelight.logs import Log
from safelight.memory.plan import Piece
from safelight.memory.scratch import Scratch
from safelight.memory.segments import Segment
from safelight.weights import slab_views
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent, Overlay

_log = Log(__name__)

Checksums = Hashable
"""What is known about a segment's checksums, one of three:

- the checksums: the bytes were verified. Two are equal if and only if the bytes are equal.
- ``Unverified(expected)``: the bytes arrived and were not compared.
- None: nothing is known.
"""


@dataclass(frozen=True, slots=True)
class Unverified:
    """A segment arrived, and its bytes were not compared with the ``expected`` checksums.

    ``expected``: None if no earlier copy was verified.
    """

    expected: Checksums


@dataclass(frozen=True, eq=False)
class SegmentBuffer:
    """A segment, the slab that holds or will hold its bytes, and the views of its tensors in that slab."""

    segment: Segment
    slab: Slab
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, segment: Segment, slab: Slab) -> SegmentBuffer:
        return cls(segment, slab, slab_views.views(slab.base, segment.tensors, segment.dtypes))


Fetch = Callable[[Sequence[SegmentBuffer]], list[Checksums]]
"""Fills the buffers and returns the checksums of each, once all bytes have arrived.

An entry is ``Unverified(expected)`` if that copy was not verified.
"""


class Source(Protocol):
    """Fetches the segments of a component in a dtype."""

    def open(
        self,
        component: ComponentManifest,
        dtype: torch.dtype,
        background: bool = False,
        unread: frozenset[str] = frozenset(),
    ) -> AbstractContextManager[Fetch]:
        """Return a function that fetches the component's segments, any number of times, within the context.

        ``background``: this is a prefetch, and nobody needs the segments yet.
        ``unread``: names of tensors; the caller does not ask for segments that have no others.
        """
        ...

    @property
    def has_waiting_lease(self) -> bool:
        """Whether a lease waits for room in the memory that the source itself uses."""
        ...

    def compute_checksums(self, buffer: SegmentBuffer) -> Checksums:
        """Compute the checksums of the bytes that are in the buffer now."""
        ...

    def follow_budget(self, fetch: Fetch) -> None:
        """Adapt the memory that the source itself uses to the machine's current limits.

        Call it between two uses of the segments that ``fetch`` fills.
        """
        ...


class FileSource:
    """Reads segments from the manifest's files into host memory. One pass reads, hashes and casts the bytes.

    Overlays are applied there, before anybody sees the weights. A segment in a dtype always has the same bytes, so its
    checksums are computed at the first read and are valid for all later reads.

    ``threads``: threads for reading and for applying overlays. The last bits of an overlaid weight depend on it.
    ``scratch``: folder for finished segments of a lease that streams them.
    """

    def __init__(self, threads: int, scratch: Path | None = None) -> None:
        self._threads = threads
        self._folder = scratch
        self._checksums: dict[tuple[str, Piece], Checksums] = {}

    @property
    def has_waiting_lease(self) -> bool:
        """See :class:`Source`. Always False: this source uses no memory of its own."""
        return False

    @contextlib.contextmanager
    def open(
        self,
        component: ComponentManifest,
        dtype: torch.dtype,
        background: bool = False,
        unread: frozenset[str] = frozenset(),
    ) -> Generator[Fetch]:
        """See :class:`Source`."""
        del dtype, unread
        if not isinstance(component, OverlaidComponent):
            yield lambda buffers: self._fetch(component.digest, buffers, background)
            return
        with component.open_overlays() as overlays, Scratch(self._folder) as scratch:
            yield lambda buffers: self._fetch_with_overlays(component.digest, buffers, overlays, scratch, background)

    def _fetch_with_overlays(
        self,
        digest: str,
        buffers: Sequence[SegmentBuffer],
        overlays: Mapping[str, Overlay],
        scratch: Scratch,
        background: bool,
    ) -> list[Checksums]:
        """Fetch segments with overlays: apply the overlays, or read the result that this lease stored before."""
        found = {buffer: self._read_scratch(digest, buffer, scratch) for buffer in buffers}
        missing = [buffer for buffer, checksums in found.items() if checksums is None]
        read_all(
            [r for m in missing for r in slab_views.reads(m.segment.tensors, m.tensors, hash_result=False)],
            self._threads,
            background,
        )
        for buffer in missing:
            with torch_threads(self._threads), torch.inference_mode():
                for name, tensor in buffer.tensors.items():
                    if name in overlays:
                        tensor.copy_(overlays[name].apply(tensor))
            found[buffer] = self._compute_and_compare(digest, buffer)
            if any(name in overlays for name in buffer.tensors):
                scratch.offer(buffer.segment.piece.index, buffer.slab.base[: buffer.segment.nbytes])
        return [found[buffer] for buffer in buffers]

    def _read_scratch(self, digest: str, buffer: SegmentBuffer, scratch: Scratch) -> Checksums:
        """Read a segment from scratch and return its checksums. None if the segment is missing or corrupted."""
        known = self._checksums.get((digest, buffer.segment.piece))
        if known is None or not scratch.read(buffer.segment.piece.index, buffer.slab.base):
            return None
        if self.compute_checksums(buffer) == known:
            return known
        what = buffer.segment.label
        _log.warning("a scratch file's weights were corrupted on disk; computing them again", what=what)
        return None

    def _compute_and_compare(self, digest: str, buffer: SegmentBuffer) -> Checksums:
        """Return the checksums of a segment that was just computed.

        Raises IntegrityError if they differ from those of the first time."""
        key, checksums = (digest, buffer.segment.piece), self.compute_checksums(buffer)
        if self._checksums.setdefault(key, checksums) != checksums:
            what = f"{buffer.segment.label} with its overlay"
            problem = "differs from the first time it was computed"
            remedy = "Test this machine's memory, for example with memtest86+."
            raise IntegrityError(buffer.segment.tensors[0].path, what, problem, remedy)
        return checksums

    def _fetch(self, digest: str, buffers: Sequence[SegmentBuffer], background: bool) -> list[Checksums]:
        keys = [(digest, buffer.segment.piece) for buffer in buffers]
        reads = [
            read
            for key, buffer in zip(keys, buffers, strict=True)
            for read in slab_views.reads(buffer.segment.tensors, buffer.tensors, key not in self._checksums)
        ]
        produced = iter(read_all(reads, self._threads, background))
        for key, buffer in zip(keys, buffers, strict=True):
            checksums = tuple(next(produced) for _ in buffer.segment.tensors)
            self._checksums.setdefault(key, checksums)
        return [self._checksums[key] for key in keys]

    def compute_checksums(self, buffer: SegmentBuffer) -> Checksums:
        """See :class:`Source`. There is one for each tensor."""
        return tuple(checksum_of(tensor) for tensor in buffer.tensors.values())

    def follow_budget(self, fetch: Fetch) -> None:
        """See :class:`Source`. Nothing to do: this source uses no memory of its own."""
        del fetch
