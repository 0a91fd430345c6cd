"""A placeholder for a parameter without bytes. It raises an error when it is used.

The meta device is not enough: a ``Conv2d`` with its weight on meta and a CPU input raises no error and returns
uninitialised memory (torch 2.13). An absent parameter raises in every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from safelight.errors import AbsentTensorError

_ATTRIBUTES = ("shape", "dtype", "device", "requires_grad", "is_sparse", "is_leaf", "is_meta", "grad", "ndim")
_METHODS = ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "__repr__")

DESCRIBING = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES] + [getattr(torch.Tensor, name) for name in _METHODS]
)
"""The only functions allowed on an absent tensor: those that describe it."""


class AbsentParameter(nn.Parameter):
    """A parameter with a shape and a dtype but no bytes. Every operation with it raises AbsentTensorError."""

    label: str

    def __new__(cls, label: str, shape: Sequence[int], dtype: torch.dtype) -> AbsentParameter:
        data = torch.empty(tuple(shape), dtype=dtype, device="meta")
        absent: AbsentParameter = torch.Tensor._make_subclass(cls, data, False)  # pyright: ignore[reportAttributeAccessIssue]
        absent.label = label
        return absent

    def __init__(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"<absent {self.label}>"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise AbsentTensorError(_first_label([*args, *(kwargs or {}).values()]), getattr(func, "__name__", str(func)))


def _first_label(values: Sequence[Any]) -> str:
    for value in values:
        if isinstance(value, AbsentParameter):
            return value.label
        if isinstance(value, (list, tuple)):
            found = _first_label(value)
            if found:
                return found
    return ""
