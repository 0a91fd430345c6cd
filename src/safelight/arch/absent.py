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

_DESCRIBING = frozenset(
    {
        torch.Tensor.shape.__get__,  # pyright: ignore
        torch.Tensor.dtype.__get__,  # pyright: ignore
        torch.Tensor.device.__get__,  # pyright: ignore
        torch.Tensor.requires_grad.__get__,  # pyright: ignore
        torch.Tensor.is_sparse.__get__,  # pyright: ignore
        torch.Tensor.is_leaf.__get__,  # pyright: ignore
        torch.Tensor.is_meta.__get__,  # pyright: ignore
        torch.Tensor.grad.__get__,  # pyright: ignore
        torch.Tensor.ndim.__get__,  # pyright: ignore
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.element_size,
        torch.Tensor.__repr__,
    }
)
"""What may be asked of a tensor that is not there: its description."""


class AbsentParameter(nn.Parameter):
    """Has a shape and a dtype, holds no bytes; every operation with it raises AbsentTensorError."""

    label: str

    def __new__(cls, label: str, shape: Sequence[int], dtype: torch.dtype) -> AbsentParameter:
        data = torch.empty(tuple(shape), dtype=dtype, device="meta")
        absent: AbsentParameter = torch.Tensor._make_subclass(cls, data, False)  # pyright: ignore
        absent.label = label
        return absent

    def __init__(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # pyright: ignore
        return f"<absent {self.label}>"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore
                return func(*args, **(kwargs or {}))
        raise AbsentTensorError(_first_label([*args, *(kwargs or {}).values()]), getattr(func, "__name__", str(func)))


def _first_label(values: Sequence[Any]) -> str:
    for value in values:
        if isinstance(value, AbsentParameter):
            return value.label
        if isinstance(value, (list, tuple)):
            found = _first_label(value)  # pyright: ignore
            if found:
                return found
    return ""
