"""Builds the libraries' modules on meta, and names the classes that families build."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from safelight.boundary import TRANSFORMERS, VERSION, hushed
from safelight.boundary.convolutions import replace_convolutions
from safelight.boundary.kernels import set_attention
from safelight.errors import InputError
from safelight.extensions import by_reference

UNET: Any = UNet2DConditionModel
CONTROLNET: Any = ControlNetModel
KL_AUTOENCODER: Any = AutoencoderKL
CLIP_CONFIG: Any = CLIPTextConfig
CLIP_WITH_PROJECTION: Any = CLIPTextModelWithProjection


@cache
def library_class(reference: str) -> Any:
    """Import a class or function of diffusers or transformers: ``package.module:Name``.

    Only the family that builds it waits for the import.
    Raises InputError if the installed version does not have it.
    """
    package = reference.partition(".")[0]
    try:
        with hushed():
            return by_reference(reference)
    except (ImportError, AttributeError) as error:
        have = {"diffusers": VERSION, "transformers": TRANSFORMERS}[package]
        name = reference.rpartition(":")[2]
        raise InputError(f"this model needs {name}, which {package} {have} does not have: upgrade {package}") from error


def clip(settings: Any) -> nn.Module:
    """Create a CLIPTextModel whose tensors have the names of current versions of transformers.

    Older versions of transformers keep embeddings, encoder and final norm in a child ``text_model``. Their forward
    method needs it, so it stays an attribute, but the module's own children are those of ``text_model``.
    """
    module = CLIPTextModel(settings)
    inner = module._modules.pop("text_model", None)
    if inner is not None:
        for name, child in inner.named_children():
            module.add_module(name, child)
        module.__dict__["text_model"] = inner
    return module


def is_clip(module: nn.Module) -> bool:
    return isinstance(module, (CLIPTextModel, CLIPTextModelWithProjection))


def is_projected_clip(module: nn.Module) -> bool:
    return isinstance(module, CLIPTextModelWithProjection)


def build(
    construct: Callable[[], nn.Module],
    run_lazy_init: Callable[[nn.Module], None],
    make_buffer: Callable[[nn.Module, str, torch.Tensor], torch.Tensor | None],
    make_caches: Callable[[nn.Module, torch.device], None],
    keeps_fp32: Callable[[str], bool],
    dtype: torch.dtype,
    attention: str,
    at: torch.device,
    slice_size: str = "auto",
    seamless: str = "",
) -> nn.Module:
    """Build a module on meta, in eval mode and in ``dtype``. Its non-persistent buffers are real, on ``at``.

    ``construct``: creates the module.
    ``run_lazy_init``: calls it on meta, so that hooks that a library installs at the first call belong to the skeleton.
    ``make_buffer``: returns the content of a buffer; None if the buffer is unknown.
    ``make_caches``: computes what the module caches in plain attributes at its first call.
    ``keeps_fp32``: whether a parameter of that name is in fp32, not in ``dtype``.
    ``attention``, ``slice_size``: see :func:`safelight.boundary.kernels.set_attention`.
    ``seamless``: axes along which convolutions wrap around to the opposite side.

    Raises NotImplementedError for an unknown buffer.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with hushed():
        try:
            with torch.device("meta"):
                module = construct()
        finally:
            torch.set_default_dtype(previous)
        module = module.to(dtype).eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            if keeps_fp32(name):
                parameter.data = parameter.data.float()
    set_attention(module, attention, slice_size)
    replace_convolutions(module, seamless)
    with torch.device("meta"), torch.no_grad():
        run_lazy_init(module)
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                made = make_buffer(child, name, buffer)
                if made is None:
                    raise NotImplementedError(f"{type(module).__name__} has an unknown buffer: {path}.{name}")
                child._buffers[name] = made.to(at)
    make_caches(module, at)
    return module
