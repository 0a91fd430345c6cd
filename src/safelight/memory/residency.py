"""Which components are resident, and who holds them.

Getting a component and holding it is one step (a lease); what is leased is never evicted. Room is made before a
component is read, never after, so that the limit is a bound.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass

import structlog
import torch

from safelight.devices.pool import SlabPool
from safelight.errors import OutOfMemoryError
from safelight.weights import store
from safelight.weights.manifest import ComponentManifest
from safelight.weights.store import WeightSet

_log = structlog.get_logger(__name__)

Key = tuple[str, torch.dtype]
"""A component's digest and the dtype in which it is resident."""


@dataclass
class _Resident:
    weights: WeightSet
    leases: int = 0


class Residency:
    """The components that are resident on one device, within ``limit`` bytes of slabs (in use and kept free).

    Safe to be used by several threads: loading is serialised.
    """

    def __init__(self, pool: SlabPool, limit: int, threads: int) -> None:
        self.pool = pool
        self.limit = limit
        self.threads = threads
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def resident_bytes(self) -> int:
        return sum(resident.weights.nbytes for resident in self._residents.values())

    @contextlib.contextmanager
    def lease(self, component: ComponentManifest, dtype: torch.dtype) -> Generator[WeightSet]:
        """The component's weights in ``dtype``, held until the context ends.

        Raises OutOfMemoryError when it does not fit beside what others hold, IntegrityError when its bytes are wrong.
        """
        key = (component.digest, dtype)
        with self._lock:
            resident = self._residents.get(key)
            if resident is None:
                self._make_room(component, store.resident_bytes(component, dtype))
                resident = _Resident(store.load(component, dtype, self.pool, self.threads))
                self._residents[key] = resident
            self._residents.move_to_end(key)
            resident.leases += 1
        try:
            yield resident.weights
        finally:
            with self._lock:
                resident.leases -= 1
                if resident.weights.spoiled and not resident.leases and self._residents.get(key) is resident:
                    self._evict(key)

    def drop(self, digest: str | None = None) -> None:
        """Drop what nobody holds: the components of that digest, or all. Kept slabs go with the last."""
        with self._lock:
            for key in [key for key, resident in self._residents.items() if not resident.leases]:
                if digest is None or key[0] == digest:
                    self._evict(key)
            if digest is None:
                self.pool.trim(0)

    def _make_room(self, component: ComponentManifest, needed: int) -> None:
        while self.resident_bytes + needed > self.limit:
            free = next((key for key, resident in self._residents.items() if not resident.leases), None)
            if free is None:
                held = self.resident_bytes
                hint = f"The limit is max_cache_ram_gb={self.limit / 2**30:g}; raise it."
                raise OutOfMemoryError(f"{component.role}", needed, self.limit - held, hint)
            self._evict(free)
        reused = self.pool.fitting(needed)
        spare = self.limit - self.resident_bytes - (0 if reused else needed)
        self.pool.trim(max(spare, reused))

    def _evict(self, key: Key) -> None:
        resident = self._residents.pop(key)
        slab = resident.weights.slab
        resident.weights.tensors.clear()
        if not self.pool.give(slab):
            _log.warning("a tensor outlived its binding; its memory is not used again", holders=slab.holders())
