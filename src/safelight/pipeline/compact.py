"""Decides which components stay quantised in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from safelight.catalog.model import Model
from safelight.memory.segments import Segment, needed_segments, widened_bytes
from safelight.pipeline.resources import Resources, dtype_of
from safelight.pipeline.stages import unread_tensors
from safelight.pipeline.workload import describe_workload
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest


def keep_compact(model: Model, resources: Resources, run_settings: RunSettings | None = None) -> Model:
    """Return the model whose quantised components stay quantised where they would not fit dequantised.

    A component that fits is dequantised when it is read, because each use of a quantised weight takes time. Of a
    denoiser that does not fit, as many segments are dequantised as there is room for beside all components. Pixels do
    not depend on it. The limit is the computing device's memory, without what computing an image of the model's
    resolution needs: what other models hold can be evicted.
    ``run_settings``: those of ``resources`` by default.
    """
    if not any(tensor.is_compact for component in model.manifest.components for tensor in component.tensors):
        return model
    settings = run_settings or resources.run_settings
    pixels = model.resolution**2
    plans = [_Plan.of(one, model, resources, settings, pixels) for one in model.manifest.components]
    components: list[ComponentManifest] = []
    # One component computes at a time, so only one of them dequantises.
    dequantising = max(resources.residency.planner.dequantised_bytes(one.component, one.dtype) for one in plans)
    for plan in plans:
        room = plan.most - sum(one.nbytes for one in plans) - dequantising
        # The denoiser is used at each step, the others once.
        widen = plan.component.role == model.family.denoiser and plan.component.compact and room > 0
        component, count = plan.widened(room) if widen else (plan.component, 0)
        if plan.has_quantised:
            resources.forms[f"{component.role} {component.digest[:16]}"] = plan.words(count)
        components.append(component)
    return replace(model, manifest=replace(model.manifest, components=tuple(components)))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of a component before its segments are widened.

    ``component``: with ``compact`` as it is decided.
    ``wide``: bytes of the component if all of it is dequantised.
    ``most``: bytes of memory for its weights.
    """

    component: ComponentManifest
    segments: tuple[Segment, ...]
    dtype: torch.dtype
    has_quantised: bool
    wide: int
    most: int

    @staticmethod
    def of(
        component: ComponentManifest, model: Model, resources: Resources, settings: RunSettings, pixels: int
    ) -> _Plan:
        dtype, unread = dtype_of(settings, model.family, component.role), unread_tensors(model, component)
        segments = needed_segments(component, dtype, unread)
        wide, has_quantised = sum(one.nbytes for one in segments), any(one.is_compact for one in component.tensors)
        if not has_quantised:
            return _Plan(component, segments, dtype, False, wide, wide)

        def most(component: ComponentManifest) -> int:
            working = describe_workload(component, dtype, settings, pixels).guess
            return resources.residency.planner.most_weight_bytes(working)

        if wide <= most(component):
            return _Plan(component, segments, dtype, True, wide, most(component))
        component = replace(component, compact=True)
        return _Plan(component, needed_segments(component, dtype, unread), dtype, True, wide, most(component))

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.segments)

    def widened(self, room: int) -> tuple[ComponentManifest, int]:
        """Dequantise the first segments for which there is room. Returns how many these are, too.

        Only the last of them changes when there is a little more room or less.
        """
        names, count = set[str](), 0
        for segment in self.segments:
            room -= widened_bytes(self.component, segment, self.dtype) - segment.nbytes
            if room < 0:
                break
            quantised = {one.name for one in segment.tensors if self.component.can_stay_compact(one)}
            names |= quantised
            count += bool(quantised)
        return replace(self.component, widened=frozenset(names)), count

    def words(self, count: int) -> str:
        form = "quantised" if self.component.compact else "dequantised"
        if count:
            form += f", but {count} of its {len(self.segments)} segments dequantised"
        return f"{form}: it has {self.wide / 1e9:.3g} GB dequantised, and {self.most / 1e9:.3g} GB are for its weights"
