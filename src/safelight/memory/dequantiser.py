"""Dequantises weights that stay quantised in memory, when an operation uses them."""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import torch

from safelight.devices.pool import Slab, SlabPool
from safelight.weights.block_decoding import dequantise
from safelight.weights.manifest import ComponentManifest
from safelight.weights.slab_views import bytes_needed, computing_dtype


class Dequantiser:
    """Dequantises tensors of one component into slabs that it uses again.

    The system must first provide the memory of a new slab, which takes longer than to dequantise. A slab is used again
    when nobody holds a tensor in it. So there are as many slabs as an operation uses tensors.

    ``dtype``: that of the component.
    ``pool``: the slabs count like weights in memory.
    ``owner``: for the ledger.
    """

    def __init__(self, component: ComponentManifest, dtype: torch.dtype, pool: SlabPool, owner: str = "") -> None:
        self._compact = {one.name: one for one in component.tensors if component.stays_compact(one)}
        self._dtypes = {name: computing_dtype(component.config, name, dtype) for name in self._compact}
        self._nbytes = {name: math.prod(one.shape) * self._dtypes[name].itemsize for name, one in self._compact.items()}
        self._pool = pool
        self._owner = owner
        self._slabs: list[Slab] = []
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._compact

    def __len__(self) -> int:
        return len(self._compact)

    @property
    def slab_bytes(self) -> int:
        """Bytes of its slabs."""
        with self._lock:
            return sum(slab.nbytes for slab in self._slabs)

    def reserve(self, nbytes: int) -> None:
        """Take a slab of ``nbytes`` in advance, if there is none. Raises OutOfMemoryError, or OverBudget."""
        with self._lock:
            if nbytes and not self._slabs:
                self._slabs.append(self._pool.take(nbytes, self._owner, REASON))

    def dequantise(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the component, on the device of its bytes. It is right as long as somebody holds it.

        ``raw``: its bytes as the file stores them.
        """
        tensor, nbytes = self._compact[name], self._nbytes[name]
        with self._lock:
            base = self._free_slab(nbytes).base
            out = base[:nbytes].view(self._dtypes[name]).view(tensor.shape).detach()
        dequantise(tensor, raw, out)
        return out

    def _free_slab(self, nbytes: int) -> Slab:
        """Return a free slab of ``nbytes`` or more. A new one replaces the free ones, which are too small."""
        free = [slab for slab in self._slabs if slab.holders() == 0]
        found = next((slab for slab in free if slab.nbytes >= nbytes), None)
        if found is None:
            self._give(free)
            # The operation cannot go on without it. The plan left room for one slab, and most operations need one.
            found = self._pool.take(nbytes, self._owner, REASON, over_budget=True)
            self._slabs.append(found)
        return found

    def close(self) -> None:
        """Return the slabs to the pool."""
        with self._lock:
            self._give(list(self._slabs))

    def _give(self, slabs: list[Slab]) -> None:
        for slab in slabs:
            self._slabs.remove(slab)
            self._pool.give(slab)


REASON = "dequantised weights"
"""The ledger's reason for the slabs."""


@lru_cache(maxsize=64)
def dequantised_bytes(component: ComponentManifest, dtype: torch.dtype) -> int:
    """Return the bytes that a slab needs for the largest tensor that stays quantised in memory. 0 if there is none."""
    compact = (one for one in component.tensors if component.stays_compact(one))
    sizes = (bytes_needed([one], [computing_dtype(component.config, one.name, dtype)]) for one in compact)
    return max(sizes, default=0)
