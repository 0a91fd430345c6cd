"""The error for a component that does not fit in memory."""

from __future__ import annotations

import math

from safelight.errors import OutOfMemoryError
from safelight.memory.budget import HOST
from safelight.memory.lease import Use
from safelight.memory.plan import Refusal
from safelight.weights.manifest import ComponentManifest


def cache_setting(place: str) -> str:
    """Return the name of the setting that limits the weights in ``place``."""
    return "max_cache_ram_gb" if place == HOST else "max_cache_vram_gb"


def refusal_error(
    component: ComponentManifest,
    use: Use,
    refusal: Refusal,
    place: str,
    budget: int,
    max_bytes: int | None,
    partial: bool,
) -> OutOfMemoryError:
    """Build the error for a lease that the planner refused. It names the least memory and the setting to change.

    ``place``: the ledger's name of the memory.
    ``budget``: bytes of that memory.
    ``max_bytes``: bytes that the settings allow; None if that is not what the component lacks.
    ``partial``: whether a component may be resident in part.
    """
    setting = cache_setting(place)
    working, lacking = use.working_bytes, refusal.least - refusal.available
    if max_bytes is not None:
        hint = f"{setting} is {_gb(max_bytes)}; at least {_gb(max_bytes + lacking)} is needed"
    else:
        hint = (
            f"This process can use {_gb(budget)} GB, {_gb(working)} GB of it for computing; "
            f"at least {_gb(budget + lacking)} GB is needed"
        )
    hint += f", because {refusal.reason}."
    if not partial:
        hint += " With enable_partial_loading: true it needs less."
    role = component.role.replace("_", " ")
    return OutOfMemoryError(f"The {role}", refusal.least, max(0, refusal.available), hint, final=True)


def _gb(nbytes: int) -> str:
    """Format bytes as gigabytes (2^30 bytes), rounded up."""
    return f"{math.ceil(nbytes / 2**30 * 10000) / 10000:.4f}"
