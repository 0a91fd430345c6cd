"""Binding: gives a skeleton the weights of a lease for the duration of a context.

Afterwards, no reference holds the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import nn

from safelight.devices.base import ALIGNMENT
from safelight.errors import BindingError, ModuleModifiedError
from safelight.logs import Log
from safelight.memory.lease import Lease
from safelight.models.skeleton import Skeleton, SkeletonCache, SkeletonKey
from safelight.models.streamed import StreamedParameter

_log = Log(__name__)


class _Binding:
    """The parameters of one binding, resident and streamed."""

    def __init__(self, skeleton: Skeleton, lease: Lease) -> None:
        self._skeleton = skeleton
        self._lease = lease
        self._resident: dict[str, tuple[nn.Parameter, int]] = {}
        self._streamed: dict[str, StreamedParameter] = {}

    def check(self) -> None:
        """Raise BindingError if the weights' names, shapes or dtype differ from the skeleton's."""
        role, ours, theirs = self._skeleton.key.role, self._skeleton.shapes, self._lease.shapes
        if ours != theirs:
            odd = sorted(ours.keys() ^ theirs.keys())
            odd += sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
            raise BindingError(f"weights do not fit the {role}: {', '.join(odd[:5])}")
        if self._lease.dtype != self._skeleton.key.dtype:
            raise BindingError(f"weights in {self._lease.dtype} do not fit a {role} in {self._skeleton.key.dtype}")

    def begin(self) -> None:
        """Give every module its parameters: resident or streamed."""
        for name in self._skeleton.parameter_owners:
            tensor = self._lease.resident_tensor(name)
            self._place(name, self._stream(name) if tensor is None else self._hand_out(name, tensor))

    def change(self, names: Sequence[str], resident: bool) -> None:
        """Switch tensors to resident or streamed.

        Call it before the lease drops the tensors that become streamed.
        """
        self._end(names)
        for name in names:
            tensor = self._lease.resident_tensor(name) if resident else None
            self._place(name, self._stream(name) if tensor is None else self._hand_out(name, tensor))

    def end(self) -> None:
        """Give every module its absent parameters again, and empty the parameters of this binding."""
        self._skeleton.clear()
        self._end([*self._resident, *self._streamed])

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        owner, attribute = self._skeleton.parameter_owners[name]
        owner._parameters[attribute] = parameter

    def _hand_out(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        version = tensor._version
        if self._lease.address(tensor) % ALIGNMENT:
            role = self._skeleton.key.role
            raise BindingError(f"{role}: {name} does not start at a multiple of {ALIGNMENT} bytes")
        if tensor.dtype != self._skeleton.dtypes[name]:
            role, wanted = self._skeleton.key.role, self._skeleton.dtypes[name]
            raise BindingError(f"{role}: {name} is in {tensor.dtype}; its module needs {wanted}")
        parameter = nn.Parameter(tensor, requires_grad=False)
        self._resident[name] = (parameter, version)
        return parameter

    def _stream(self, name: str) -> StreamedParameter:
        shape, dtype = self._lease.shapes[name], self._skeleton.dtypes[name]
        parameter = StreamedParameter.of(name, shape, dtype, self._skeleton.key.device, self._lease.use_tensors)
        self._streamed[name] = parameter
        return parameter

    def _end(self, names: Sequence[str]) -> None:
        key, dtypes = self._skeleton.key, self._skeleton.dtypes
        nothing = {dtype: torch.empty(0, dtype=dtype, device=key.device) for dtype in set(dtypes.values())}
        for name in names:
            streamed = self._streamed.pop(name, None)
            if streamed is not None:
                streamed.access = None
            bound_parameter = self._resident.pop(name, None)
            if bound_parameter is not None:
                parameter, version = bound_parameter
                tensor = self._lease.resident_tensor(name)
                if tensor is not None and tensor._version != version:
                    _log.warning("a bound weight was modified; it will be read again", role=key.role, name=name)
                    self._lease.mark_corrupted(name)
                parameter.data = nothing[dtypes[name]]


@contextlib.contextmanager
def bind(cache: SkeletonCache, key: SkeletonKey, lease: Lease) -> Generator[nn.Module]:
    """Yield the module of ``key`` with the leased weights as its parameters.

    When the context ends, also by an error, the module's parameters are absent again, and the Parameter objects of this
    binding are emptied. So a stray reference to the module, a pipeline or a traceback's frame holds no weights.

    Raises BindingError if the weights differ from the skeleton's tensors in names, shapes or dtype, or do not start at
    aligned addresses, on which fp32 results depend.
    Raises ModuleModifiedError at the end if the module changed while it was bound. Its results cannot be trusted then.
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
        cache.put_back(skeleton)
        raise
    lease.on_change = None
    binding.end()
    if changed := cache.put_back(skeleton):
        raise ModuleModifiedError(key.role, changed)
