"""A parameter that is not there, and says so.

The meta device is not enough: a ``Conv2d`` whose weight is on meta, called with a CPU input, raises nothing and returns
uninitialised memory (torch 2.13). An absent parameter takes part in no operation at all.
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
"""What may be asked of a tensor that is not there: its description."""


class AbsentParameter(nn.Parameter):
    """Has a shape and a dtype, holds no bytes; every operation with it raises AbsentTensorError."""

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
