"""Describes a stage for the memory estimate: a key for measurements, and a first guess from shapes."""

from __future__ import annotations

import math

import torch

from safelight.memory.working_memory import Workload
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest
from safelight.weights.overlay import OverlaidComponent
from safelight.weights.slab_views import computing_dtype

KERNEL_WORKSPACE_BYTES = 48 << 20
"""Bytes of the kernels' own workspaces."""


def describe_workload(
    component: ComponentManifest,
    dtype: torch.dtype,
    run_settings: RunSettings,
    pixels: int,
    variant: str = "",
    tokens: int = 0,
) -> Workload:
    """Return the workload of one forward pass of a component.

    ``pixels``: of the image.
    ``variant``: distinguishes uses of one component.
    ``tokens``: of a text with reference images; 0 for other inputs.
    """
    config = component.config
    kind = component.role + variant + (" quantised" if component.compact else "")
    overlays = overlay_bytes_while_computing(component, run_settings)
    if overlays:
        # Kinds of adapters need different amounts.
        kind += f" adapters {overlays >> 20}"
    name = " ".join(
        (kind, config.label, str(dtype).removeprefix("torch."), run_settings.attention, run_settings.device)
    )
    quadratic = run_settings.attention == "normal" and config.depends_on_size
    needed = max(config.working_bytes(pixels, dtype.itemsize, quadratic), config.text_bytes(tokens, dtype.itemsize))
    size = pixels if config.depends_on_size else max(1, tokens)
    return Workload(
        name, size, KERNEL_WORKSPACE_BYTES + needed + _dequantised_bytes(component, dtype) + overlays, quadratic
    )


def overlay_bytes_while_computing(component: ComponentManifest, run_settings: RunSettings) -> int:
    """Return the bytes for computing overlays while the component computes; 0 if they are computed before.

    They are computed when a weight that stays quantised is used, and when a segment is streamed to a device.
    """
    if not isinstance(component, OverlaidComponent):
        return 0
    return component.working_bytes if component.computes_at_use or run_settings.device != "cpu" else 0


def _dequantised_bytes(component: ComponentManifest, dtype: torch.dtype) -> int:
    """Return the bytes of the largest tensor that an operation dequantises, 0 if there is none."""
    compact = (tensor for tensor in component.tensors if component.stays_compact(tensor))
    sizes = (math.prod(one.shape) * computing_dtype(component.config, one.name, dtype).itemsize for one in compact)
    return max(sizes, default=0)
