"""Builds components' modules on meta, from their shapes and their base."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from safelight.arch.diffusers_fence import hushed
from safelight.arch.diffusers_fence.kernels import set_attention
from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.keys.controlnet import ControlNetConfig
from safelight.formats.keys.unet import UNetConfig
from safelight.formats.keys.vae import VAEConfig
from safelight.formats.layout import BASES, CHANNELS_PER_HEAD, END_TOKEN, ComponentConfig, attention_heads

TIME_IDS_WIDTH = 256
"""Embedding width of each of SDXL's size and crop numbers in the added conditioning."""


SAMPLE_SIZES = {"sd1": 64, "sd2": 96, "sdxl": 128, "sdxl-refiner": 128}
"""Side length in latents at which each base was trained, from the published settings."""


START_TOKEN = 49406


def build(
    base: str,
    config: ComponentConfig,
    dtype: torch.dtype,
    attention: str,
    at: torch.device,
    slice_size: str = "auto",
    seamless: str = "",
) -> nn.Module:
    """Build a module on meta, in eval mode and in ``dtype``. Its non-persistent buffers are real, on ``at``.

    ``attention``, ``slice_size``: see :func:`safelight.arch.diffusers_fence.kernels.set_attention`.
    ``seamless``: axes along which convolutions wrap around to the opposite side.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with hushed():
        try:
            with torch.device("meta"):
                module = construct(base, config, attention)
        finally:
            torch.set_default_dtype(previous)
        module = module.to(dtype).eval().requires_grad_(False)
    set_attention(module, attention, slice_size)
    _make_seamless(module, seamless)
    _run_once(module)
    _real_buffers(module, at)
    return module


def construct(base: str, config: ComponentConfig, attention: str = "torch-sdp") -> nn.Module:
    match config:
        case CLIPConfig():
            return _text_encoder(config, attention)
        case VAEConfig():
            return _vae(base, config)
        case UNetConfig():
            return _unet(base, config)
        case ControlNetConfig():
            return _controlnet(base, config)
        case AdapterConfig():
            raise ValueError(config)


def _text_encoder(config: CLIPConfig, attention: str) -> nn.Module:
    settings = cast("Any", CLIPTextConfig)(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.intermediate,
        projection_dim=config.projection or config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.width // CHANNELS_PER_HEAD),
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        bos_token_id=START_TOKEN,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
        # transformers has two of these kernels. Slicing is not needed for 77 tokens.
        attn_implementation="eager" if attention in ("normal", "sliced") else "sdpa",
    )
    return CLIPTextModel(settings) if config.projection is None else CLIPTextModelWithProjection(settings)


def _vae(base: str, config: VAEConfig) -> nn.Module:
    levels = len(config.block_out_channels)
    return cast("Any", AutoencoderKL)(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        scaling_factor=BASES[base].scaling_factor,
    )


def _unet(base: str, config: UNetConfig) -> nn.Module:
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths))
    return cast("Any", UNet2DConditionModel)(
        # Pipelines compare it with the image size, which they always receive explicitly.
        sample_size=SAMPLE_SIZES[base],
        out_channels=config.out_channels,
        up_block_types=up,
        **_encoder(base, config),
    )


def _encoder(base: str, config: UNetConfig) -> dict[str, Any]:
    """The settings that a UNet and a ControlNet for it share."""
    rule = BASES[base]
    added: dict[str, Any] = {}
    if config.time_features is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_IDS_WIDTH,
            "projection_class_embeddings_input_dim": config.time_features,
        }
    return {
        "in_channels": config.in_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths),
        "transformer_layers_per_block": (*(depth or 1 for depth in config.depths[:-1]), config.mid_depth),
        "cross_attention_dim": config.cross_attention_dim,
        "attention_head_dim": rule.heads or tuple(attention_heads(rule, width) for width in config.block_out_channels),
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": 32,
        **added,
    }


def _controlnet(base: str, config: ControlNetConfig) -> nn.Module:
    return cast("Any", ControlNetModel)(
        conditioning_channels=config.hint_channels,
        conditioning_embedding_out_channels=config.hint,
        **_encoder(base, config.encoder),
    )


class _Seamless(nn.Conv2d):
    """A convolution that wraps around along ``axes``, and pads with zeros along other axes."""

    axes: str

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
        down, across = (int(pad) for pad in self.padding)
        for axis, sides in (("x", (across, across, 0, 0)), ("y", (0, 0, down, down))):
            input = F.pad(input, sides, "circular" if axis in self.axes else "constant")  # noqa: A001
        return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)


def _make_seamless(module: nn.Module, axes: str) -> None:
    for child in module.modules() if axes else ():
        if type(child) is nn.Conv2d and any(child.padding):
            child.__class__ = _Seamless
            cast("_Seamless", child).axes = axes


def _run_once(module: nn.Module) -> None:
    """Run a text encoder once. So the hooks that transformers installs at the first call belong to the skeleton."""
    if isinstance(module, (CLIPTextModel, CLIPTextModelWithProjection)):
        with torch.device("meta"), torch.no_grad():
            module(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)


def _real_buffers(module: nn.Module, at: torch.device) -> None:
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is None:
                continue
            if name == "position_ids" and name in child._non_persistent_buffers_set:
                child._buffers[name] = torch.arange(buffer.shape[-1], device="cpu").expand((1, -1)).to(at)
            else:
                raise NotImplementedError(f"{type(module).__name__} has an unknown buffer: {path}.{name}")
