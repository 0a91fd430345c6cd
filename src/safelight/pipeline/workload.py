"""The work of a stage: a name under which its need of memory is remembered, and a first estimate from shapes."""

from __future__ import annotations

import torch

from safelight.memory.working_memory import Work
from safelight.request.run_settings import RunSettings
from safelight.weights.manifest import ComponentManifest

LIBRARIES = 48 << 20
"""Bytes that the kernels' own workspaces take."""


def of(component: ComponentManifest, dtype: torch.dtype, run: RunSettings, pixels: int, task: str = "") -> Work:
    """Return the work of one forward pass of a component.

    ``pixels``: of the image.
    ``task``: tells a component's several kinds of work apart.
    """
    config = component.config
    kind = component.role + task
    name = " ".join((kind, config.label, str(dtype).removeprefix("torch."), run.attention, run.device))
    quadratic = run.attention == "normal" and config.depends_on_size
    guess = LIBRARIES + config.working_bytes(pixels, dtype.itemsize, quadratic)
    return Work(name, pixels if config.depends_on_size else 1, guess, quadratic)
