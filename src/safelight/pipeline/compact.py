"""Decides which components stay quantised in memory."""

from __future__ import annotations

from dataclasses import replace

from safelight.catalog.model import Model
from safelight.memory.segments import needed_segments
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.stages import unread_tensors
from safelight.pipeline.workload import describe_workload
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest


def keep_compact(model: Model, resources: Resources, run_settings: RunSettings | None = None) -> Model:
    """Return the model whose quantised components stay quantised where they would not fit dequantised.

    A component that fits is dequantised when it is read, because each use of a quantised weight takes time. Pixels do
    not depend on it. The limit is the computing device's memory, without what computing an image of the model's
    resolution needs: what other models hold can be evicted.
    ``run_settings``: those of ``resources`` by default.
    """
    settings = run_settings or resources.run_settings
    pixels = model.resolution**2

    def chosen(component: ComponentManifest) -> ComponentManifest:
        if not any(tensor.is_compact for tensor in component.tensors):
            return component
        dtype = dtype_of(settings, model.family, component.role)
        segments = needed_segments(component, dtype, unread_tensors(model, component))
        working = describe_workload(component, dtype, settings, pixels).guess
        most = resources.residency.planner.most_weight_bytes(working)
        wide = sum(one.nbytes for one in segments)
        form = "quantised" if wide > most else "dequantised"
        why = f"{form}: it has {wide / 1e9:.3g} GB dequantised, and {most / 1e9:.3g} GB are for its weights"
        resources.forms[f"{component.role} {component.digest[:16]}"] = why
        return replace(component, compact=True) if wide > most else component

    components = tuple(map(chosen, model.manifest.components))
    return replace(model, manifest=replace(model.manifest, components=components))
