"""Everything wired: the engine of this process, from the settings."""

from __future__ import annotations

import os
from importlib.metadata import version

import torch

from safelight.assemble.control import open_library
from safelight.config import Settings
from safelight.devices import choice
from safelight.devices.pool import SlabPool
from safelight.engine.local import LocalEngine
from safelight.memory import machine
from safelight.memory.residency import Residency
from safelight.types import Precision, RunSettings

SHARE = 0.7
"""Of the memory that can be had, for models."""

VERSIONS = ("safelight", "torch", "diffusers", "transformers")


def open_engine(settings: Settings) -> LocalEngine:
    """An engine on the device that the settings name, or the best that there is."""
    device = choice.device(settings.device)
    threads = settings.threads or os.cpu_count() or 1
    limit = settings.max_cache_ram_gb
    limit_bytes = int(limit * 2**30) if limit is not None else _default_limit(device)
    residency = Residency(SlabPool(device), limit_bytes, threads)
    versions = {name: version(name) for name in VERSIONS}

    def decide(precision: Precision) -> RunSettings:
        wanted = precision if precision != "auto" else settings.precision
        dtype = choice.precision(wanted, device)
        # fp16 overflows in SDXL's VAE and in some others; the VAE is small.
        vae_dtype = "fp32" if dtype == "fp16" else dtype
        return RunSettings(str(device), dtype, vae_dtype, settings.attention_type, threads, versions)

    return LocalEngine(open_library(settings), residency, decide)


def _default_limit(device: torch.device) -> int:
    """Bytes for models when no limit is set: a share of what can be had now; the rest is for computing."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(machine.tightest().available * SHARE)
