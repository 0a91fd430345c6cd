"""Makes small ControlNets and textual inversions for the tiny checkpoints, in their published forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from support import checkpoints
from torch import nn

from safelight.families.family_model import construct
from safelight.families.registry import family
from safelight.families.sd import controlnet
from safelight.families.sd.controlnet import ControlNetConfig
from safelight.families.sd.unet import UNetConfig

HINT = (8, 16, 16, 16)


def config(base: str) -> ControlNetConfig:
    unet = checkpoints.configs(base)["unet"]
    assert isinstance(unet, UNetConfig)
    return ControlNetConfig(unet, HINT, 3)


def module(base: str, seed: int) -> nn.Module:
    """A ControlNet with seeded random weights, also where training starts from zero."""
    net = construct(family(base), config(base)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(0 if name.endswith("bias") else 1, 0.05, generator=generator)
    return net


def write(path: Path, base: str = "sd1", seed: int = 31, ldm: bool = False) -> Path:
    """The tensors under the names of diffusers or of the original code."""
    tensors = {name: tensor.clone() for name, tensor in module(base, seed).state_dict().items()}
    if ldm:
        names = {row.name: row.sources[-1].name for row in controlnet.tensors(config(base))}
        tensors = {f"control_model.{names[name]}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    return path


def picture(path: Path, seed: int = 9) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    PILImage.fromarray(values).resize((64, 64), PILImage.Resampling.BICUBIC).save(path)
    return path


def vectors(count: int, width: int = 64, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.3


def inversion(path: Path, count: int = 2, form: str = "emb_params", seed: int = 5) -> Path:
    """Write a textual inversion: ``emb_params``, ``diffusers`` (the word is the tensor's name) or ``sdxl``.

    With the suffix ``.pt``, it is a pickle as AUTOMATIC1111 writes it.
    """
    if path.suffix == ".pt":
        values = {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": {"*": vectors(count, seed=seed)},
            "name": path.stem,
            "step": 500,
            "sd_checkpoint": None,
        }
        torch.save(values, path)
    elif form == "sdxl":
        save_file({"clip_l": vectors(count, seed=seed), "clip_g": vectors(count, seed=seed + 1)}, path)
    else:
        save_file({"<thing>" if form == "diffusers" else form: vectors(count, seed=seed)}, path)
    return path
