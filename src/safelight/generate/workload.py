"""What a stage computes, named so that its need of memory can be known again, and guessed from shapes at first."""

from __future__ import annotations

import torch

from safelight.formats.keys.adapters import AdapterConfig
from safelight.formats.keys.clip import CLIPConfig
from safelight.formats.keys.controlnet import ControlNetConfig
from safelight.formats.keys.unet import UNetConfig
from safelight.formats.keys.vae import VAEConfig
from safelight.memory.working import Work
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest

UNET_TENSORS = 48
"""Tensors as large as the UNet's first feature map that live at once, guidance pair and skips included."""

VAE_TENSORS = 8
"""Tensors as large as the VAE's last feature map that live at once while it decodes."""

LIBRARIES = 48 << 20
"""Bytes that the kernels' own workspaces take."""


def of(component: ComponentManifest, dtype: torch.dtype, run: RunSettings, pixels: int, task: str = "") -> Work:
    """The work of one forward pass of a component for an image of ``pixels`` pixels; ``task`` tells a VAE's two."""
    config = component.config
    name = " ".join(
        (component.role + task, _widths(component), str(dtype).removeprefix("torch."), run.attention, run.device)
    )
    quadratic = run.attention == "normal" and not isinstance(config, CLIPConfig)
    if isinstance(config, CLIPConfig):
        # Its size does not depend on the image's.
        return Work(name, 1, LIBRARIES + config.positions * config.intermediate * 4 * dtype.itemsize)
    if isinstance(config, ControlNetConfig):
        config = config.encoder
    if isinstance(config, UNetConfig):
        map_bytes = 2 * (pixels // 64) * config.block_out_channels[0] * dtype.itemsize
        scores = 2 * 8 * (pixels // 64) ** 2 * dtype.itemsize if quadratic else 0
        return Work(name, pixels, LIBRARIES + UNET_TENSORS * map_bytes + scores, quadratic)
    assert isinstance(config, VAEConfig)
    scores = (pixels // 64) ** 2 * dtype.itemsize
    map_bytes = pixels * config.block_out_channels[0] * dtype.itemsize
    return Work(name, pixels, LIBRARIES + VAE_TENSORS * map_bytes + scores, quadratic)


def _widths(component: ComponentManifest) -> str:
    match component.config:
        case CLIPConfig() as clip:
            return f"{clip.width}x{clip.layers}"
        case ControlNetConfig() as control:
            return f"{'-'.join(map(str, control.encoder.block_out_channels))}x{control.encoder.layers_per_block}"
        case UNetConfig() as unet:
            return f"{'-'.join(map(str, unet.block_out_channels))}x{unet.layers_per_block}"
        case VAEConfig() as vae:
            return f"{'-'.join(map(str, vae.block_out_channels))}x{vae.layers_per_block}"
        case AdapterConfig():
            raise ValueError(component.config)
