"""Dequantises weights that stay quantised in memory, when an operation uses them."""

from __future__ import annotations

import math
import threading

import torch

from safelight.weights.block_decoding import dequantise
from safelight.weights.manifest import ComponentManifest
from safelight.weights.slab_views import computing_dtype


class Dequantiser:
    """Dequantises tensors of one component into buffers that it uses again.

    The system must first provide the memory of a new buffer, which takes longer than to dequantise. A buffer is used
    again when nobody holds a tensor in it. So there are as many buffers as an operation uses tensors.

    ``dtype``: that of the component.
    """

    def __init__(self, component: ComponentManifest, dtype: torch.dtype) -> None:
        self._compact = {one.name: one for one in component.tensors if component.stays_compact(one)}
        self._dtypes = {name: computing_dtype(component.config, name, dtype) for name in self._compact}
        self._nbytes = {name: math.prod(one.shape) * self._dtypes[name].itemsize for name, one in self._compact.items()}
        self._buffers: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._compact

    def dequantise(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the component, on the device of its bytes. It is right as long as somebody holds it.

        ``raw``: its bytes as the file stores them.
        """
        tensor, nbytes = self._compact[name], self._nbytes[name]
        with self._lock:
            out = self._free_buffer(nbytes, raw.device)[:nbytes].view(self._dtypes[name]).view(tensor.shape).detach()
        dequantise(tensor, raw, out)
        return out

    def _free_buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return a free buffer of ``nbytes`` or more. A new one replaces the free ones, which are too small."""
        free = [buffer for buffer in self._buffers if _holders(buffer) == 0]
        found = next((buffer for buffer in free if buffer.numel() >= nbytes), None)
        if found is None:
            self._buffers = [one for one in self._buffers if not any(one is buffer for buffer in free)]
            free.clear()
            found = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._buffers.append(found)
        return found

    def close(self) -> None:
        """Give up the buffers."""
        with self._lock:
            self._buffers.clear()


def _holders(buffer: torch.Tensor) -> int:
    """Return how many tensors share a buffer's memory, without the buffer itself."""
    count: int = torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)
    # The buffer and the storage object of this call hold it too.
    return count - 2
