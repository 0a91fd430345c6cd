"""A parameter whose bytes are fetched when an operation uses it.

It looks like the parameter but holds no bytes. An operation on it receives the real tensor while it runs. So streaming
works for everything that uses a weight: any module, a parameter outside leaf layers, a wrapped or captured ``forward``,
a weight used twice. It needs no hooks on modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from safelight.errors import AbsentTensorError
from safelight.models.absent import DESCRIBING, AbsentParameter


class TensorAccess(Protocol):
    """Yields tensors by name within a context. See :meth:`safelight.memory.lease.Lease.use_tensors`."""

    def __call__(self, names: Sequence[str]) -> Any: ...


class StreamedParameter(AbsentParameter):
    """Stands for the tensor ``label``. ``access`` fetches the tensor to ``compute_device``."""

    access: TensorAccess | None
    compute_device: torch.device

    @classmethod
    def of(
        cls, label: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, access: TensorAccess
    ) -> StreamedParameter:
        parameter = cls(label, shape, dtype)
        parameter.access, parameter.compute_device = access, device
        return parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in DESCRIBING:
            first = args[0]
            # ``torch.Tensor.device.__get__`` is a new object each time, so compare with ``==``, not ``is``.
            if func == _DEVICE and isinstance(first, StreamedParameter):
                return first.compute_device
            return super().__torch_function__(func, types, args, kwargs)
        flat, spec = pytree.tree_flatten((tuple(args), kwargs))
        streamed = [value for value in flat if isinstance(value, StreamedParameter)]
        access = streamed[0].access if streamed else None
        if access is None:
            raise AbsentTensorError(streamed[0].label if streamed else "", getattr(func, "__name__", str(func)))
        with access([value.label for value in streamed]) as tensors:
            there = {id(value): tensor for value, tensor in zip(streamed, tensors, strict=True)}
            del tensors
            flat = [there.get(id(value), value) for value in flat]
            there.clear()
            real_args, real_kwargs = pytree.tree_unflatten(flat, spec)
            del flat
            return func(*real_args, **real_kwargs)


_DEVICE = torch.Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
