"""A parameter whose bytes come when they are used.

It looks like the parameter and holds nothing. An operation that is given it gets the tensor itself for as long as it
runs. So streaming works for whatever touches a weight: any module, a parameter outside leaf layers, a ``forward`` that
was wrapped or captured, a weight used twice; and no hook on a module is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from safelight.arch.absent import DESCRIBING, AbsentParameter
from safelight.errors import AbsentTensorError


class Pinning(Protocol):
    """Gives tensors by name for the time of a context: :meth:`safelight.memory.lease.Lease.pinned`."""

    def __call__(self, names: Sequence[str]) -> Any: ...


class StreamedParameter(AbsentParameter):
    """Stands for the tensor ``label``, which ``pinned`` brings; ``at`` is the device on which it will be."""

    pinned: Pinning | None
    at: torch.device

    @classmethod
    def of(
        cls, label: str, shape: Sequence[int], dtype: torch.dtype, at: torch.device, pinned: Pinning
    ) -> StreamedParameter:
        made = cls(label, shape, dtype)
        made.pinned, made.at = pinned, at
        return made

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
            # The getters are made anew each time they are named: they are equal, not identical.
            if func == _DEVICE and isinstance(first, StreamedParameter):
                return first.at
            return super().__torch_function__(func, types, args, kwargs)
        flat, spec = pytree.tree_flatten((tuple(args), kwargs))
        streamed = [value for value in flat if isinstance(value, StreamedParameter)]
        pinned = streamed[0].pinned if streamed else None
        if pinned is None:
            raise AbsentTensorError(streamed[0].label if streamed else "", getattr(func, "__name__", str(func)))
        with pinned([value.label for value in streamed]) as tensors:
            there = {id(value): tensor for value, tensor in zip(streamed, tensors, strict=True)}
            del tensors
            flat = [there.get(id(value), value) for value in flat]
            there.clear()
            real_args, real_kwargs = pytree.tree_unflatten(flat, spec)
            del flat
            return func(*real_args, **real_kwargs)


_DEVICE = torch.Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
