"""What a generation works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from safelight.catalog.inputs import Inputs
from safelight.devices.base import Device
from safelight.devices.verification import Verification
from safelight.families.family import Family
from safelight.memory.residency import Residency
from safelight.memory.working_memory import WorkingMemory
from safelight.models.skeleton import SkeletonCache
from safelight.pipeline.checks.appearance import Looks
from safelight.pipeline.conditioning import Conditionings
from safelight.pipeline.preview import Previews
from safelight.request.run_settings import RunSettings

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Resources:
    """What a generation works with. ``upcoming``: components that the queue will want next, for planning.

    ``working``: what computing takes beside weights; ``computing``: bytes that it takes now, for measuring.
    ``promised``: bytes to promise to computing instead of what was measured, None to go by that.
    ``verification``: which uses of resident weights are followed by summing them again. ``inputs``: the images that
    requests start from. ``previews``: draws unfinished images, None to draw none. ``looks``: marks images whose look is
    suspicious. ``conditionings``: what text encoders made of prompts before.
    """

    device: Device
    residency: Residency
    skeletons: SkeletonCache
    working: WorkingMemory
    computing: Callable[[], int]
    run: RunSettings
    verification: Verification
    inputs: Inputs
    promised: int | None = None
    upcoming: tuple[str, ...] = ()
    previews: Previews | None = None
    looks: Looks = field(default_factory=Looks)
    conditionings: Conditionings = field(default_factory=Conditionings)
    report: Callable[[], Mapping[str, Any]] = dict[str, Any]


def computing_all(resources: Resources) -> Resources:
    """The same, with nothing kept of what text encoders made: what is proven is all computed."""
    return replace(resources, conditionings=Conditionings())


def dtype_of(settings: RunSettings, family: Family, role: str) -> torch.dtype:
    """Return the dtype in which a component computes."""
    return TORCH_DTYPES[settings.vae_dtype if role == family.vae else settings.dtype]
