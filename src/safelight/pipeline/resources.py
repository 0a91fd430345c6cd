"""The caches, the memory and the run settings of one engine, which a generation uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from safelight.catalog.inputs import Inputs
from safelight.devices.base import Device
from safelight.devices.verification import Verification
from safelight.families.family import CONTROLNET, Family
from safelight.memory.residency import Residency
from safelight.memory.working_memory import MeasurePeak, WorkingMemoryEstimator
from safelight.models.skeleton import SkeletonCache
from safelight.pipeline.checks.appearance import AppearanceCheck
from safelight.pipeline.conditioning import EmbeddingCache
from safelight.pipeline.preview import Previews
from safelight.request.run_settings import RunSettings

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Resources:
    """The resources of one engine.

    ``working_memory_estimator``: estimates the working memory of each stage.
    ``measure_peak``: measures the working memory that a stage uses.
    ``run_settings``: the run settings.
    ``verification``: decides after which uses resident weights are verified.
    ``inputs``: the input images.
    ``working_memory_override``: working memory to reserve instead of the estimate, in bytes; None to use the estimate.
    ``upcoming``: the components that the queue will want next, for planning.
    ``previews``: draws unfinished images; None to draw none.
    ``appearance_check``: marks images that look suspicious.
    ``embedding_cache``: the cache of text-encoder outputs.
    ``forms``: why each quantised component is in memory in its form, by its role and digest.
    ``report``: returns the memory report that a progress message contains; None if it needs none.
    """

    device: Device
    residency: Residency
    skeletons: SkeletonCache
    working_memory_estimator: WorkingMemoryEstimator
    measure_peak: MeasurePeak
    run_settings: RunSettings
    verification: Verification
    inputs: Inputs
    working_memory_override: int | None = None
    upcoming: tuple[str, ...] = ()
    previews: Previews | None = None
    appearance_check: AppearanceCheck = field(default_factory=AppearanceCheck)
    embedding_cache: EmbeddingCache = field(default_factory=EmbeddingCache)
    forms: dict[str, str] = field(default_factory=dict[str, str])
    report: Callable[[], Mapping[str, Any] | None] = dict[str, Any]


def without_text_cache(resources: Resources) -> Resources:
    """Return the resources with an empty cache of text-encoder outputs, so that a check computes everything."""
    return replace(resources, embedding_cache=EmbeddingCache())


def dtype_of(settings: RunSettings, family: Family, role: str) -> torch.dtype:
    """Return the dtype in which a component computes. A ControlNet computes in the denoiser's."""
    if role == family.vae:
        return TORCH_DTYPES[settings.vae_dtype]
    if role == CONTROLNET:
        role = family.denoiser
    overflows = settings.dtype == "fp16" and any(one.overflows_in_fp16 for one in family.components if one.role == role)
    return torch.float32 if overflows else TORCH_DTYPES[settings.dtype]
