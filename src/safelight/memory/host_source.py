"""The source of segments for a device with its own memory: host memory, which caches or streams them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from safelight.devices import sums
from safelight.devices.transfer import Transfers
from safelight.errors import TransferError
from safelight.logs import Log
from safelight.memory.lease import Lease, Use
from safelight.memory.plan import Piece
from safelight.memory.residency import Residency
from safelight.memory.source import Checksums, Fetch, SegmentBuffer, Unverified
from safelight.weights.manifest import ComponentManifest

_log = Log(__name__)


@dataclass(eq=False)
class _Copying:
    """A component that is being copied.

    ``lock``: allows one copy at a time, because the host streams through one slot.
    ``lease``: the host's lease, from the first copy on.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    lease: Lease | None = None


class HostSource:
    """Copies segments from host memory, where ``host`` caches or streams them, to a device.

    ``keep``: the host caches the weights as long as there is room (``keep_ram_copy_of_weights``). If False, it frees
    them and their slabs as soon as they are copied.
    """

    def __init__(self, host: Residency, transfers: Transfers, keep: bool) -> None:
        self.host = host
        self._transfers = transfers
        self._keep = keep
        self._copying: dict[Fetch, _Copying] = {}
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
    ) -> Generator[Fetch]:
        """See :class:`Source`. The host leases the component at the first fetch.

        A component that is already resident on the device needs no host memory.
        """
        copying = _Copying()
        with contextlib.ExitStack() as stack:

            def fetch(buffers: Sequence[SegmentBuffer]) -> list[Checksums]:
                return [copy(buffer) for buffer in buffers]

            def copy(buffer: SegmentBuffer) -> Checksums:
                with copying.lock:
                    if copying.lease is None:
                        lease = self.host.lease(component, dtype, Use(unread=unread), background)
                        copying.lease = stack.enter_context(lease)
                    return self._push(copying.lease, buffer)

            self._copying[fetch] = copying
            try:
                yield fetch
            finally:
                del self._copying[fetch]
                with copying.lock:
                    copied, copying.lease = copying.lease is not None, None
                    stack.close()
                if copied and not self._keep:
                    self.host.drop(component.digest)
                    self.host.pool.trim()

    def _push(self, lease: Lease, buffer: SegmentBuffer) -> Checksums:
        piece, what = buffer.segment.piece, buffer.segment.label
        # The key is the piece, because labels do not name the model.
        verify = self._transfers.verification.due(f"{piece.component_key} {piece.index}")
        if verify and not lease.verify_segment(piece.index):
            _log.warning("weights in host memory were corrupted; reading them again", what=what)
            lease.refetch_segment(piece.index)
        for again in (False, True):
            if again:
                lease.refetch_segment(piece.index)
            try:
                with lease.slab_of(piece.index) as source:
                    arrived = self._transfers.push(
                        what,
                        source.base[: buffer.segment.nbytes],
                        buffer.slab.base[: buffer.segment.nbytes],
                        verify or again,
                    )
                if arrived is None:
                    # The bytes of a piece never change, so a later check compares with the checksum of an earlier copy.
                    return Unverified(self._device_checksums.get(piece))
                self._device_checksums[piece] = arrived
                return arrived
            except TransferError:
                if again:
                    raise
                event = "a copy to the device was still corrupted after it was repeated"
                _log.warning(f"{event}; reading the weights again and copying once more", what=what)
        raise AssertionError

    def compute_checksums(self, buffer: SegmentBuffer) -> Checksums:
        """See :class:`Source`. There is one sum, of the whole segment, computed on the device."""
        return sums.compute_sum(buffer.slab.base[: buffer.segment.nbytes])

    def follow_budget(self, fetch: Fetch) -> None:
        """See :class:`Source`. The host evicts cached copies if others need the memory, and rereads them later."""
        for other, copying in list(self._copying.items()):
            # Another fetch may be reading from a slow disk. It is adapted at a later call, so that nobody waits for it.
            if copying.lock.acquire(blocking=other is fetch):
                try:
                    if copying.lease is not None:
                        copying.lease.adjust()
                finally:
                    copying.lock.release()
        self.host.shrink_to_budget()
