"""Segments for a device with memory of its own: they come from the host's memory, which keeps or streams them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import structlog
import torch

from safelight.devices import sums
from safelight.devices.transfer import Transfers
from safelight.errors import TransferError
from safelight.memory.residency import Lease, Residency
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

    @contextlib.contextmanager
    def opened(self, component: ComponentManifest, dtype: torch.dtype) -> Generator[Fetch]:
        """See :class:`Source`. The component is leased on the host for as long."""
        with self.host.lease(component, dtype) as lease:
            yield lambda targets: [self._push(lease, target) for target in targets]
        if not self._keep:
            self.host.drop(component.digest)

    def _push(self, lease: Lease, target: Target) -> Proof:
        segment, index = target.segment, target.segment.piece.index
        for again in (False, True):
            if again:
                lease.renew(index)
            try:
                with lease.held(index) as source:
                    sent = source.base[: segment.nbytes]
                    proof = self._transfers.push(segment.label, sent, target.slab.base[: segment.nbytes])
                self._transfers.counts.again += again
                return proof
            except TransferError:
                if again:
                    raise
                _log.warning("a copy could not be repaired; its source is read again", what=segment.label)
        raise AssertionError

    def proof(self, target: Target) -> Proof:
        """See :class:`Source`: the sum of the whole slab, on the device."""
        return sums.of(target.slab.base[: target.segment.nbytes])
