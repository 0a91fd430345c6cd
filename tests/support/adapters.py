"""Makes small adapters for the tiny checkpoints, in every published naming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import checkpoints

from safelight.catalog.library import Library
from safelight.families.components import Config

RANK = 4

Name = Callable[[str, str, str], str]
"""Returns a tensor's name for (role, module, slot); the slots are down, up and alpha."""


Configs = Mapping[str, Config]


def modules(base: str, configs: Configs | None = None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (role, module, shape of its weight) of every layer that adapters change.

    ``configs``: of the components; by default those of the tiny checkpoint.
    """
    for role, config in (configs or checkpoints.configs(base)).items():
        for row in config.rows():
            module, _, leaf = row.name.rpartition(".")
            attention = any(part in module for part in ("attn", "proj_in", "proj_out", ".ff."))
            if role == "unet" and leaf == "weight" and (attention or "conv1" in module) and len(row.shape) >= 2:
                yield role, module, row.shape
            if role.startswith("text_encoder") and leaf == "weight" and "self_attn" in module:
                yield role, module, row.shape


def kohya(role: str, module: str, slot: str, two: bool = False) -> str:
    """Names such as ``lora_unet_…``. ``two``: the checkpoint has two text encoders."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    path = module if role == "unet" else f"text_model.{module.removeprefix('text_model.')}"
    return prefix[role] + path.replace(".", "_") + {"alpha": ".alpha"}.get(slot, f".lora_{slot}.weight")


def kohya_two(role: str, module: str, slot: str) -> str:
    return kohya(role, module, slot, two=True)


def peft(role: str, module: str, slot: str) -> str:
    """The names that ``pipeline.save_lora_weights`` writes."""
    path = module if role == "unet" else f"text_model.{module.removeprefix('text_model.')}"
    return f"{role}.{path}." + {"alpha": "alpha", "down": "lora_A.weight", "up": "lora_B.weight"}[slot]


def lora(
    base: str,
    seed: int,
    name: Name,
    scale: float = 0.2,
    alpha: float | None = 2.0,
    rank: int = RANK,
    configs: Configs | None = None,
) -> dict[str, torch.Tensor]:
    """Low-rank pairs for every layer that adapters change."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for role, module, shape in modules(base, configs):
        rows_, columns, *kernel = shape
        made[name(role, module, "down")] = torch.randn(rank, columns, *kernel, generator=generator) * scale
        made[name(role, module, "up")] = torch.randn(rows_, rank, *(1 for _ in kernel), generator=generator) * scale
        if alpha is not None:
            made[name(role, module, "alpha")] = torch.tensor(alpha)
    return made


def write(path: Path, base: str = "sd1", seed: int = 1, name: Name = kohya, **more: Any) -> Path:
    """Write a file of such pairs."""
    save_file(lora(base, seed, name, **more), path)
    return path


def for_starter(path: Path, seed: int = 1, name: str = "starter-noto") -> Path:
    """Write a file for the starters."""
    model = Library(path.parent).get(name)
    configs = {component.role: component.config for component in model.manifest.components}
    return write(path, "sd1", seed, configs=configs, scale=0.05)
