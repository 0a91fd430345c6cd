"""Sources of a segment's bytes and how to verify them, and the source that reads files.

A segment's checksums are computed when its bytes are produced. Computing them again from the bytes in memory verifies
the bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Sequence
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
from safelight.weights.overlay import OpenedOverlays, OverlaidComponent, stay

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

    def clear_padding(self) -> None:
        """Set the bytes between tensors, and behind the last one, to zero. The slab is in host memory.

        Sums on a device cover them, and what was in the slab before must not change a sum.
        """
        base, at = self.slab.base, 0
        for tensor in self.tensors.values():
            start = tensor.data_ptr() - base.data_ptr()
            base[at:start].zero_()
            at = start + tensor.numel() * tensor.element_size()
        base[at : self.segment.nbytes].zero_()


class Fetcher(Protocol):
    """Fetches the segments of one component, any number of times."""

    def fetch(self, buffers: Sequence[SegmentBuffer]) -> list[Checksums]:
        """Fill the buffers and return the checksums of each, once all bytes have arrived.

        An entry is ``Unverified(expected)`` if that copy was not verified.
        """
        ...

    def apply_overlay(self, name: str, tensor: torch.Tensor) -> None:
        """Compute the overlay of a weight in its place.

        ``name``: that of a weight with an overlay.
        ``tensor``: the weight, where it is computed with; it is overwritten.
        """
        ...

    def follow_budget(self) -> None:
        """Adapt the memory that the source itself uses to the machine's current limits.

        Call it between two uses of the segments that this fetcher fills.
        """
        ...


class Source(Protocol):
    """Fetches the segments of a component in a dtype."""

    def open(
        self,
        component: ComponentManifest,
        dtype: torch.dtype,
        background: bool = False,
        unread: frozenset[str] = frozenset(),
    ) -> AbstractContextManager[Fetcher]:
        """Return what fetches the component's segments within the context.

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
    ) -> Generator[Fetcher]:
        """See :class:`Source`."""
        del dtype, unread
        if not isinstance(component, OverlaidComponent):
            yield _FileFetcher(self, component.digest, background, self._checksums, self._threads)
            return
        with component.open_overlays(stay) as overlays, Scratch(self._folder) as scratch:
            at_arrival = frozenset(one.name for one in component.tensors if component.arrives_with_overlay(one))
            shared = self._checksums, self._threads
            yield _OverlayingFetcher(self, component.digest, background, *shared, overlays, at_arrival, scratch)

    def compute_checksums(self, buffer: SegmentBuffer) -> Checksums:
        """See :class:`Source`. There is one for each tensor."""
        return tuple(checksum_of(tensor) for tensor in buffer.tensors.values())


@dataclass(frozen=True, eq=False)
class _FileFetcher:
    """Reads the segments of a component without overlays. See :class:`FileSource`."""

    source: FileSource
    digest: str
    background: bool
    checksums: dict[tuple[str, Piece], Checksums]
    threads: int

    def fetch(self, buffers: Sequence[SegmentBuffer]) -> list[Checksums]:
        """See :class:`Fetcher`."""
        for buffer in buffers:
            buffer.clear_padding()
        keys = [(self.digest, buffer.segment.piece) for buffer in buffers]
        reads = [
            read
            for key, buffer in zip(keys, buffers, strict=True)
            for read in slab_views.reads(buffer.segment.tensors, buffer.tensors, key not in self.checksums)
        ]
        produced = iter(read_all(reads, self.threads, self.background))
        for key, buffer in zip(keys, buffers, strict=True):
            checksums = tuple(next(produced) for _ in buffer.segment.tensors)
            self.checksums.setdefault(key, checksums)
        return [self.checksums[key] for key in keys]

    def apply_overlay(self, name: str, tensor: torch.Tensor) -> None:
        """See :class:`Fetcher`. A component without overlays has no such weight."""
        raise KeyError(name, tuple(tensor.shape))

    def follow_budget(self) -> None:
        """See :class:`Fetcher`. Nothing to do: the source uses no memory of its own."""


@dataclass(frozen=True, eq=False)
class _OverlayingFetcher(_FileFetcher):
    """Reads the segments of a component with overlays.

    ``at_arrival``: names of the tensors whose overlay is computed here; see :mod:`safelight.weights.overlay`.
    """

    overlays: OpenedOverlays
    at_arrival: frozenset[str]
    scratch: Scratch

    def fetch(self, buffers: Sequence[SegmentBuffer]) -> list[Checksums]:
        """See :class:`Fetcher`. It computes the overlays, or reads the result that this lease stored before."""
        with_overlays = [one for one in buffers if not self.at_arrival.isdisjoint(one.tensors)]
        plain = [one for one in buffers if one not in with_overlays]
        found: dict[SegmentBuffer, Checksums] = {}
        if plain:
            found.update(zip(plain, super().fetch(plain), strict=True))
        found.update((buffer, self._read_scratch(buffer)) for buffer in with_overlays)
        missing = [buffer for buffer, checksums in found.items() if checksums is None]
        for buffer in missing:
            buffer.clear_padding()
        read_all(
            [r for m in missing for r in slab_views.reads(m.segment.tensors, m.tensors, hash_result=False)],
            self.threads,
            self.background,
        )
        for buffer in missing:
            with torch_threads(self.threads):
                for name in self.at_arrival.intersection(buffer.tensors):
                    self.apply_overlay(name, buffer.tensors[name])
            found[buffer] = self._compute_and_compare(buffer)
            self.scratch.offer(buffer.segment.piece.index, buffer.slab.base[: buffer.segment.nbytes])
        return [found[buffer] for buffer in buffers]

    def apply_overlay(self, name: str, tensor: torch.Tensor) -> None:
        """See :class:`Fetcher`."""
        self.overlays.apply(name, tensor)

    def follow_budget(self) -> None:
        """See :class:`Fetcher`. Adapters use memory."""
        self.overlays.follow_budget()

    def _read_scratch(self, buffer: SegmentBuffer) -> Checksums:
        """Read a segment from scratch and return its checksums. None if the segment is missing or corrupted."""
        known = self.checksums.get((self.digest, buffer.segment.piece))
        if known is None or not self.scratch.read(buffer.segment.piece.index, buffer.slab.base):
            return None
        if self.source.compute_checksums(buffer) == known:
            return known
        what = buffer.segment.label
        _log.warning("a scratch file's weights were corrupted on disk; computing them again", what=what)
        return None

    def _compute_and_compare(self, buffer: SegmentBuffer) -> Checksums:
        """Return the checksums of a segment that was just computed.

        Raises IntegrityError if they differ from those of the first time."""
        key, checksums = (self.digest, buffer.segment.piece), self.source.compute_checksums(buffer)
        if self.checksums.setdefault(key, checksums) != checksums:
            # Nobody knows which of the two is wrong. The next try must not be compared with the wrong one.
            del self.checksums[key]
            what = f"{buffer.segment.label} with its overlay"
            raise changed_result(buffer, what, "Test this machine's memory, for example with memtest86+.")
        return checksums


def changed_result(buffer: SegmentBuffer, what: str, remedy: str) -> IntegrityError:
    """Return the error for a segment with overlays that was computed again and came out different."""
    return IntegrityError(buffer.segment.tensors[0].path, what, "differs from the first time it was computed", remedy)
