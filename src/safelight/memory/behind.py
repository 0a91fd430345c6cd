"""Segments for a device with memory of its own: they come from the host's memory, which keeps or streams them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence

import structlog
import torch

from safelight.devices import sums
from safelight.devices.transfer import Transfers
from safelight.errors import TransferError
from safelight.memory.lease import Lease
from safelight.memory.residency import Residency
from safelight.memory.source import Fetch, Proof, Target
from safelight.weights.manifest import ComponentManifest

_log = structlog.get_logger(__name__)


class FromHost:
    """Copies segments from host memory, where ``host`` keeps or streams them, onto a device.

    ``keep``: what the host read stays there as long as there is room (``keep_ram_copy_of_weights``).
    """

    def __init__(self, host: Residency, transfers: Transfers, keep: bool) -> None:
        self.host = host
        self._transfers = transfers
        self._keep = keep
        # The host streams through one slot: whoever copies out of it copies alone.
        self._lock = threading.RLock()
        self._leases: list[Lease] = []

    @contextlib.contextmanager
    def opened(self, component: ComponentManifest, dtype: torch.dtype) -> Generator[Fetch]:
        """See :class:`Source`. The component is leased on the host from the first fetch on: one that is on the device
        already needs nothing there."""
        with contextlib.ExitStack() as stack:
            leases: list[Lease] = []

            def fetch(targets: Sequence[Target]) -> list[Proof]:
                with self._lock:
                    if not leases:
                        leases.append(stack.enter_context(self.host.lease(component, dtype)))
                        self._leases += leases
                    return [self._push(leases[0], target) for target in targets]

            try:
                yield fetch
            finally:
                with self._lock:
                    self._leases = [lease for lease in self._leases if lease not in leases]
                stack.close()
                if leases and not self._keep:
                    self.host.drop(component.digest)

    def _push(self, lease: Lease, target: Target) -> Proof:
        piece, what = target.segment.piece, target.segment.label
        # By the piece, as labels name no model.
        verify = self._transfers.verification.due(f"{piece.component} {piece.index}")
        if verify and not lease.intact(piece.index):
            _log.warning("a copy in host memory was spoiled; it is read again", what=what)
            lease.renew(piece.index)
        for again in (False, True):
            if again:
                lease.renew(piece.index)
            try:
                with lease.held(piece.index) as source:
                    return self._transfers.push(
                        what,
                        source.base[: target.segment.nbytes],
                        target.slab.base[: target.segment.nbytes],
                        verify or again,
                    )
            except TransferError:
                if again:
                    raise
                _log.warning("a copy could not be repaired; its source is read again", what=what)
        raise AssertionError

    def proof(self, target: Target) -> Proof:
        """See :class:`Source`: the sum of the whole slab, on the device."""
        return sums.of(target.slab.base[: target.segment.nbytes])

    def follow(self) -> None:
        """See :class:`Source`: copies that are kept on the host go when others want its memory, and come back."""
        with self._lock:
            for lease in self._leases:
                lease.adjust()
            self.host.follow()
