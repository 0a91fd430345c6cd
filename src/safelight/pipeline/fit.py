"""Reports whether a model fits in memory, with which plan, and how much slower partial loading is."""

from __future__ import annotations

from typing import Any

from safelight.catalog.model import Model
from safelight.devices import choice
from safelight.errors import OutOfMemoryError
from safelight.memory.plan import Refusal
from safelight.memory.refusal import cache_setting
from safelight.memory.segments import needed_segments
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.stages import Task, describe_stage, plan_uses
from safelight.request.schema import Request

BYTES_PER_SECOND = 3e9
"""Rough speed of reading, hashing and casting a segment from a warm page cache on a few cores, in bytes per second."""


def describe_fit(request: Request, model: Model, resources: Resources) -> dict[str, Any]:
    """Return, for each component, the resident bytes, the streamed bytes, and the bytes for computing.

    ``seconds_more`` in the result: how much longer each denoising step takes than with everything resident (estimate).
    """
    width, height = request.width or model.resolution, request.height or model.resolution
    components: list[dict[str, Any]] = []
    refused: OutOfMemoryError | None = None
    for role in model.roles:
        component, dtype = model.manifest.component(role), dtype_of(resources.run_settings, model.family, role)
        task = Task("", width * height, request.step_count)
        workload = describe_stage([(component, dtype)], resources.run_settings, task)
        [use] = plan_uses(model, resources, [(component, dtype)], workload, task)
        total = sum(segment.nbytes for segment in needed_segments(component, dtype, use.unread))
        decided = resources.residency.plan_lease(component, dtype, use)
        streamed = 0
        if isinstance(decided, Refusal):
            refused = refused or resources.residency.planner.refusal_error(component, use, decided)
        else:
            streamed = decided.nbytes("stream")
        components.append(
            {
                "component": role,
                "total": total,
                "resident": 0 if isinstance(decided, Refusal) else total - streamed,
                "streamed": streamed,
                "working": use.working_bytes,
                "source": "measured" if resources.working_memory_estimator.knows(workload) else "guessed from shapes",
            }
        )
    streamed = next(c["streamed"] for c in components if c["component"] == model.family.denoiser)
    seconds = streamed / BYTES_PER_SECOND
    if refused is not None:
        summary = f"does not fit. {refused}"
    elif any(c["streamed"] for c in components):
        summary = f"fits in part; each denoising step takes about {seconds:.2f} s more than with everything resident"
    else:
        summary = "fits whole"
    return {
        "model": model.name,
        "width": width,
        "height": height,
        "dtype": resources.run_settings.dtype,
        "fits": refused is None,
        "summary": summary,
        "seconds_more": seconds,
        "components": components,
        "advice": [
            *filter(None, [choice.slowness_warning(resources.run_settings.dtype, resources.run_settings.device)]),
            *_advice(resources, components),
        ],
    }


def _advice(resources: Resources, components: list[dict[str, Any]]) -> list[str]:
    if not any(c["streamed"] or not c["resident"] for c in components):
        return []
    most = resources.residency.planner.max_bytes
    budget = resources.residency.ledger.budget(resources.residency.place)
    advice: list[str] = []
    largest = max(c["total"] + (0 if most is not None else c["working"]) for c in components)
    if most is not None and most < budget:
        setting = cache_setting(resources.residency.place)
        advice.append(f"{setting} of {largest / 2**30 + 0.001:.3f} would hold the largest component whole")
    else:
        advice.append(
            f"{max(0, largest - budget) / 1e6:,.0f} MB more free memory would hold the largest component whole"
        )
    if resources.run_settings.dtype == "fp32" and not choice.slowness_warning("bf16", resources.run_settings.device):
        advice.append("--precision bf16 takes half the memory")
    return advice
