"""The source of segments for a device with its own memory: host memory, which caches or streams them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence

import torch

from safelight.devices import sums
from safelight.devices.transfer import Transfers, torch_threads
from safelight.errors import TransferError
from safelight.logs import Log
from safelight.memory.lease import Lease, Use
from safelight.memory.plan import Piece
from safelight.memory.residency import Residency
from safelight.memory.source import Checksums, Fetcher, SegmentBuffer, Unverified, changed_result
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OpenedOverlays, OverlaidComponent, digests

_log = Log(__name__)


class HostSource:
    """Copies segments from host memory, where ``host`` caches or streams them, to a device.

    The device computes overlays from its copies of the weights. The host never has the results.

    ``keep``: the host caches the weights as long as there is room (``keep_ram_copy_of_weights``). If False, it frees
    them and their slabs as soon as they are copied.
    ``threads``: threads for computing overlays if the device computes on the CPU, as the simulated one does.
    """

    def __init__(self, host: Residency, transfers: Transfers, keep: bool, threads: int = 1) -> None:
        self.host = host
        self.transfers = transfers
        self.threads = threads
        self._keep = keep
        self._fetchers: dict[_HostFetcher, None] = {}
        self._device_checksums: dict[Piece, sums.Sum] = {}

    @property
    def has_waiting_lease(self) -> bool:
        """See :class:`Source`."""
        return self.host.has_waiting_lease

    @contextlib.contextmanager
    def open(
        self,
        component: ComponentManifest,
        dtype: torch.dtype,
        background: bool = False,
        unread: frozenset[str] = frozenset(),
    ) -> Generator[Fetcher]:
        """See :class:`Source`. The host leases the component at the first fetch.

        A component that is already resident on the device needs no host memory.
        """
        fetcher = _HostFetcher(self, component, dtype, background, unread)
        self._fetchers[fetcher] = None
        try:
            yield fetcher
        finally:
            del self._fetchers[fetcher]
            if fetcher.close() and not self._keep:
                for digest in digests(component):
                    self.host.drop(digest)
                self.host.pool.trim()

    def compute_checksums(self, buffer: SegmentBuffer) -> Checksums:
        """See :class:`Source`. There is one sum, of the whole segment, computed on the device."""
        return sums.compute_sum(buffer.slab.base[: buffer.segment.nbytes])

    def known_sum(self, piece: Piece) -> sums.Sum | None:
        """Return the sum of a piece's bytes, which never change; None if no copy of it was verified yet."""
        return self._device_checksums.get(piece)

    def store_sum(self, piece: Piece, value: sums.Sum) -> None:
        """Store the sum of a piece's bytes."""
        self._device_checksums[piece] = value

    def forget_sum(self, piece: Piece) -> None:
        """Forget the sum of a piece's bytes, because a later one differs from it."""
        self._device_checksums.pop(piece, None)

    def open_fetchers(self) -> list[_HostFetcher]:
        """Return the fetchers of all leases."""
        return list(self._fetchers)


class _HostFetcher:
    """Copies one component's segments to the device. See :class:`HostSource`."""

    def __init__(
        self,
        source: HostSource,
        component: ComponentManifest,
        dtype: torch.dtype,
        background: bool,
        unread: frozenset[str],
    ) -> None:
        self._source = source
        self._underlying = component.underlying if isinstance(component, OverlaidComponent) else component
        self._overlaid = component if isinstance(component, OverlaidComponent) else None
        self._dtype = dtype
        self._background = background
        self._unread = unread
        # One copy at a time, because the host streams through one slot.
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._overlays: OpenedOverlays | None = None
        # Set while the first result of an overlay is computed, with which later ones are compared.
        self._verify_adapters = False

    def fetch(self, buffers: Sequence[SegmentBuffer]) -> list[Checksums]:
        """See :class:`Fetcher`."""
        return [self._copy(buffer) for buffer in buffers]

    def apply_overlay(self, name: str, tensor: torch.Tensor) -> None:
        """See :class:`Fetcher`. The host leases the adapters at the first call."""
        self._open_overlays().apply(name, tensor)

    def follow_budget(self) -> None:
        """See :class:`Fetcher`. The host evicts cached copies if others need the memory, and rereads them later."""
        for fetcher in self._source.open_fetchers():
            # Another fetch may be reading from a slow disk. It is adapted at a later call, so that nobody waits for it.
            fetcher.adjust(wait=fetcher is self)
        self._source.host.shrink_to_budget()

    def adjust(self, wait: bool) -> None:
        """Adapt the host's leases, unless a copy is in progress and ``wait`` is False."""
        if self._lock.acquire(blocking=wait):
            try:
                if self._overlays is not None:
                    self._overlays.follow_budget()
                if self._lease is not None:
                    self._lease.adjust()
            finally:
                self._lock.release()

    def close(self) -> bool:
        """End the host's leases. Returns whether there were any."""
        with self._lock:
            leased = self._lease is not None or self._overlays is not None
            self._lease, self._overlays = None, None
            self._stack.close()
            return leased

    def _open_overlays(self) -> OpenedOverlays:
        # Without the lock first: another thread may hold it while it copies.
        overlays = self._overlays
        if overlays is not None:
            return overlays
        with self._lock:
            if self._overlays is None:
                assert self._overlaid is not None
                opened = self._overlaid.open_overlays(self._bring)
                self._overlays = self._stack.enter_context(opened)
            return self._overlays

    def _bring(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._source.transfers.bring(what, tensor, self._verify_adapters)

    def _copy(self, buffer: SegmentBuffer) -> Checksums:
        touched: list[str] = []
        if self._overlaid is not None:
            touched = [one.name for one in buffer.segment.tensors if self._overlaid.arrives_with_overlay(one)]
        with self._lock:
            if self._overlaid is not None:
                # The adapters are leased first. The component takes the room that is left.
                self._open_overlays()
            if self._lease is None:
                lease = self._source.host.lease(
                    self._underlying, self._dtype, Use(unread=self._unread), self._background
                )
                self._lease = self._stack.enter_context(lease)
            # Without a sum of the result, only the copy itself can be verified.
            first = bool(touched) and self._source.known_sum(buffer.segment.piece) is None
            arrived = self._push(self._lease, buffer, first)
            return self._overlay(buffer, touched, arrived) if touched else arrived

    def _overlay(self, buffer: SegmentBuffer, touched: Sequence[str], arrived: Checksums) -> Checksums:
        """Compute the overlays of ``touched`` in a segment that arrived. Returns the checksums of the result.

        Raises IntegrityError if the result differs from that of the first time.
        """
        piece = buffer.segment.piece
        known = self._source.known_sum(piece)
        self._verify_adapters = known is None
        try:
            with torch_threads(self._source.threads):
                for name in touched:
                    self.apply_overlay(name, buffer.tensors[name])
        finally:
            self._verify_adapters = False
            # Another thread may compute with the segment, on another stream.
            self._source.transfers.device.record_fence().wait()
        if isinstance(arrived, Unverified):
            return Unverified(known)
        result = sums.compute_sum(buffer.slab.base[: buffer.segment.nbytes])
        if known is not None and result != known:
            # Nobody knows which of the two is wrong. The next try must not be compared with the wrong one.
            self._source.forget_sum(piece)
            name = self._source.transfers.device.name
            remedy = f"The memory of {name} or its driver is unreliable; use --device cpu to work without it."
            raise changed_result(buffer, f"{buffer.segment.label} with its overlay", remedy)
        self._source.store_sum(piece, result)
        return result

    def _push(self, lease: Lease, buffer: SegmentBuffer, always_verify: bool) -> Checksums:
        index, what = buffer.segment.piece.index, buffer.segment.label
        piece, transfers = lease.segments[index].piece, self._source.transfers
        # The key is the piece, because labels do not name the model.
        verify = transfers.verification.due(f"{piece.component_key} {index}")
        verify |= always_verify and transfers.verification.policy != "off"
        if verify and not lease.verify_segment(index):
            _log.warning("weights in host memory were corrupted; reading them again", what=what)
            lease.refetch_segment(index)
        for again in (False, True):
            if again:
                lease.refetch_segment(index)
            try:
                with lease.slab_of(index) as source:
                    arrived = transfers.push(
                        what,
                        source.base[: buffer.segment.nbytes],
                        buffer.slab.base[: buffer.segment.nbytes],
                        verify or again,
                    )
                if arrived is None:
                    # A later check compares with the sum of an earlier copy.
                    return Unverified(self._source.known_sum(piece))
                self._source.store_sum(piece, arrived)
                return arrived
            except TransferError:
                if again:
                    raise
                event = "a copy to the device was still corrupted after it was repeated"
                _log.warning(f"{event}; reading the weights again and copying once more", what=what)
        raise AssertionError
