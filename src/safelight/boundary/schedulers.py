"""Creates diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from safelight.extensions import by_reference


def sigma(scheduler: Any) -> float:
    """Return the noise level after the last step, in the sampler's scale. It is 1 for variance-preserving samplers."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    return 1.0 if sigmas is None or index is None else float(sigmas[min(index, len(sigmas) - 1)])


_SHIFT_BY_SIZE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""Settings that diffusers' pipelines read, not the classes themselves."""

SPACING = frozenset({"timestep_spacing", "steps_offset", "shift_terminal", *_SHIFT_BY_SIZE})
"""Settings that spread the steps over the training steps. Some scheduler classes support only one way."""


def scheduler(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    """Create a scheduler.

    ``name``: diffusers' class, or ``package.module:Class`` of an installed package.
    ``settings``: its arguments. Those in :data:`SPACING` are left out if the class does not have them.
    ``seed``: seed of ``dpmpp_sde``'s noise tree, because that class ignores the pipeline's generator.

    Raises TypeError if the class does not have another setting.
    """
    kind = by_reference(name if ":" in name else f"diffusers.schedulers:{name}")
    known = inspect.signature(kind.__init__).parameters
    chosen = {key: value for key, value in settings.items() if key in known or key not in SPACING}
    if "noise_sampler_seed" in known:
        chosen["noise_sampler_seed"] = seed
    return kind(**chosen)
