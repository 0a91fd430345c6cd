"""Binding: a skeleton and weights make a model for as long as a context lasts, and nothing of it survives."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import structlog
import torch
from torch import nn

from safelight.arch.skeleton import Skeleton, SkeletonCache, SkeletonKey
from safelight.arch.streamed import StreamedParameter
from safelight.devices.base import ALIGNMENT
from safelight.errors import BindingError, StateLeftError
from safelight.memory.lease import Lease

_log = structlog.get_logger(__name__)


class _Binding:
    """The parameters that were handed out."""

    def __init__(self, skeleton: Skeleton, lease: Lease) -> None:
        self._skeleton = skeleton
        self._lease = lease
        self._resident: dict[str, tuple[nn.Parameter, int]] = {}
        self._streamed: dict[str, StreamedParameter] = {}

    def check(self) -> None:
        """Raise BindingError when the weights are not exactly the tensors of the skeleton."""
        role, ours, theirs = self._skeleton.key.role, self._skeleton.shapes, self._lease.shapes
        if ours != theirs:
            odd = sorted(ours.keys() ^ theirs.keys())
            odd += sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
            raise BindingError(f"weights do not fit the {role}: {', '.join(odd[:5])}")
        if self._lease.dtype != self._skeleton.key.dtype:
            raise BindingError(f"weights in {self._lease.dtype} do not fit a {role} in {self._skeleton.key.dtype}")

    def begin(self) -> None:
        """Put a parameter in each place."""
        for name in self._skeleton.places:
            tensor = self._lease.resident(name)
            self._place(name, self._stream(name) if tensor is None else self._hand_out(name, tensor))

    def change(self, names: Sequence[str], resident: bool) -> None:
        """These tensors are resident from now on, or streamed. Those to be streamed are still in the lease's books."""
        self._end(names)
        for name in names:
            tensor = self._lease.resident(name) if resident else None
            self._place(name, self._stream(name) if tensor is None else self._hand_out(name, tensor))

    def end(self) -> None:
        """Make every place absent again, and empty what was handed out."""
        self._skeleton.clear()
        self._end([*self._resident, *self._streamed])

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        owner, attribute = self._skeleton.places[name]
        owner._parameters[attribute] = parameter

    def _hand_out(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        version = tensor._version
        if self._lease.address(tensor) % ALIGNMENT:
            role = self._skeleton.key.role
            raise BindingError(f"{role}: {name} does not start at a multiple of {ALIGNMENT} bytes")
        parameter = nn.Parameter(tensor, requires_grad=False)
        self._resident[name] = (parameter, version)
        return parameter

    def _stream(self, name: str) -> StreamedParameter:
        key = self._skeleton.key
        made = StreamedParameter.of(name, self._lease.shapes[name], key.dtype, key.at, self._lease.pinned)
        self._streamed[name] = made
        return made

    def _end(self, names: Sequence[str]) -> None:
        key = self._skeleton.key
        nothing = torch.empty(0, dtype=key.dtype, device=key.at)
        for name in names:
            streamed = self._streamed.pop(name, None)
            if streamed is not None:
                streamed.pinned = None
            handed = self._resident.pop(name, None)
            if handed is not None:
                parameter, version = handed
                tensor = self._lease.resident(name)
                if tensor is not None and tensor._version != version:
                    _log.warning("a bound weight was written; it is read again", role=key.role, name=name)
                    self._lease.spoil(name)
                parameter.data = nothing


@contextlib.contextmanager
def bound(cache: SkeletonCache, key: SkeletonKey, lease: Lease) -> Generator[nn.Module]:
    """The module of ``key`` with the leased weights as its parameters.

    When the context ends, by whatever way, the module's parameters are absent again and the Parameters that were handed
    out are emptied: a reference to a module, to a pipeline, or to a traceback's frame that is kept somewhere holds no
    byte of the weights. Raises StateLeftError at the end when the module is no longer as it was built: what was
    computed with it cannot be trusted. Raises BindingError when the weights are not exactly the tensors of the
    skeleton, or do not start at aligned addresses, on which fp32 results depend.
    """
    skeleton = cache.take(key)
    binding = _Binding(skeleton, lease)
    try:
        binding.check()
        binding.begin()
        lease.on_change = binding.change
        yield skeleton.module
    except BaseException:
        lease.on_change = None
        binding.end()
        cache.give(skeleton)
        raise
    lease.on_change = None
    binding.end()
    if changed := cache.give(skeleton):
        raise StateLeftError(key.role, changed)
