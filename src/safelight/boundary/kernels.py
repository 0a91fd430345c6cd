"""Attention kernels as diffusers processors.

The processor objects are set directly, because ``set_attention_backend`` silently skips Stable Diffusion UNets.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, cast

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from safelight.boundary import VERSION
from safelight.errors import InputError

KERNELS = ("torch-sdp", "flash", "xformers", "sage", "normal", "sliced")
"""Names of attention kernels, in the order in which ``auto`` tries them. PyTorch's own is fast on every device."""


_PACKAGES = {"flash": "flash_attn", "xformers": "xformers", "sage": "sageattention"}
"""Kernels that need a separate package, with its module. All of them need CUDA."""

DISTRIBUTIONS = {"flash": "flash-attn", "xformers": "xformers", "sage": "sageattention"}
"""The names of these packages on the package index."""


def set_attention(module: nn.Module, name: str, slice_size: str = "auto") -> None:
    """Set a new processor for the kernel ``name`` on every diffusers attention in ``module``.

    ``slice_size``: how many heads ``sliced`` computes at once: a number, ``balanced`` or ``auto`` for half of them, or
    ``max`` for one, as in diffusers.
    """
    for child in module.modules():
        processor = getattr(child, "processor", None)
        if hasattr(processor, "_attention_backend"):
            # A transformer's own processor: it computes more than attention (norms, rotary embeddings).
            cast("Any", child).set_processor(_with_backend(type(processor), name))
        elif isinstance(child, Attention):
            if not isinstance(processor, _REPLACEABLE):
                kind = type(processor).__name__
                raise InputError(f"diffusers {VERSION} has no choice of attention in {kind}: upgrade diffusers")
            child.set_processor(_processor(name, slice_size, child.heads))


_BACKENDS = {"torch-sdp": "native", "normal": "_native_math", "flash": "flash", "xformers": "xformers", "sage": "sage"}
"""The kernels' names in diffusers' attention dispatcher. It has none for ``sliced``."""


def _with_backend(kind: type[Any], name: str) -> Any:
    if name not in _BACKENDS:
        remedy = f"use one of {', '.join(_BACKENDS)}"
        raise InputError(f"attention_type {name} exists only for UNets, not for this model's transformer; {remedy}")
    # Not above: diffusers before 0.35 lacks it, and has no such processors.
    from diffusers.models.attention_dispatch import AttentionBackendName

    processor = kind()
    processor._attention_backend = AttentionBackendName(_BACKENDS[name])
    return processor


def _processor(name: str, slice_size: str, heads: int) -> Any:
    match name:
        case "torch-sdp":
            return AttnProcessor2_0()
        case "normal":
            return AttnProcessor()
        case "sliced":
            at_once = {"auto": heads // 2, "balanced": heads // 2, "max": 1}
            return SlicedAttnProcessor(max(1, at_once[slice_size] if slice_size in at_once else int(slice_size)))
        case "xformers":
            return XFormersAttnProcessor()
        case "flash":
            return FunctionProcessor(_flash(importlib.import_module("flash_attn").flash_attn_func))
        case "sage":
            return FunctionProcessor(importlib.import_module("sageattention").sageattn)
        case _:
            raise ValueError(name)


def _flash(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adapt flash_attn's function to torch's layout. flash_attn has tokens before heads."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attend


class FunctionProcessor:
    """A processor that calls ``function``. All else is as in diffusers' ``AttnProcessor2_0``.

    ``function``: takes q, k, v, (n, heads, tokens, head size), and returns the shape of q.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None or attn.spatial_norm is not None:
            raise NotImplementedError(f"attention with a mask or a spatial norm, and {temb is not None=}")
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            keys = attn.norm_encoder_hidden_states(keys)
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys))
        )
        out = self.function(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


_REPLACEABLE = (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    FunctionProcessor,
)
"""Processors that compute attention and nothing else, so that one stands for another."""


def missing_kernel(name: str, at: torch.device) -> str | None:
    """Return why a kernel is not available on a device, None if it is."""
    package = _PACKAGES.get(name)
    if package is None:
        return None
    if at.type != "cuda":
        return f"{package} needs CUDA"
    return None if find_spec(package) is not None else f"{package} is not installed: pip install {package}"


def version_of_package(name: str) -> str:
    """Return the version of the separate package of a kernel; "" if it has none, or is not installed."""
    try:
        return version(DISTRIBUTIONS[name]) if name in DISTRIBUTIONS else ""
    except PackageNotFoundError:
        return ""


def attention_module(heads: int, head_size: int) -> nn.Module:
    """Create a diffusers attention as in a UNet, with random weights from the global generator."""
    return cast("Any", Attention)(query_dim=heads * head_size, heads=heads, dim_head=head_size)


WITH_MASK = ("torch-sdp", "normal")
"""Kernels that take a mask in diffusers' attention dispatcher."""


def has_dispatcher() -> bool:
    """Return whether diffusers has an attention dispatcher; it has since 0.35."""
    return find_spec("diffusers.models.attention_dispatch") is not None


def reaches_dispatcher(name: str) -> bool:
    """Return whether a kernel can be chosen for transformers."""
    return name in _BACKENDS


class _Backend:
    """The processor of :class:`DispatchedAttention`: it only says which kernel the dispatcher calls."""

    _attention_backend: Any = None


class DispatchedAttention(nn.Module):
    """Attention by diffusers' dispatcher, as in its transformers, with the parameters of :func:`attention_module`."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.set_processor(_Backend())

    def set_processor(self, processor: _Backend) -> None:
        """Set what :func:`set_attention` makes."""
        self.processor = processor

    def forward(
        self, hidden: torch.Tensor, keys: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend. ``attention_mask``: bool (n, 1, 1, keys), False for keys that are hidden."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        keys = hidden if keys is None else keys
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.to_q(hidden), self.to_k(keys), self.to_v(keys))
        )
        backend = self.processor._attention_backend
        out = cast("Any", dispatch_attention_fn)(q, k, v, attn_mask=attention_mask, backend=backend)
        return self.to_out[0](out.flatten(2).to(q.dtype))
