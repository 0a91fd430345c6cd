"""What is said when a component does not fit."""

from __future__ import annotations

import math

from safelight.errors import OutOfMemoryError
from safelight.memory.budget import HOST
from safelight.memory.lease import Lease
from safelight.memory.plan import Refusal


def too_large(
    lease: Lease, refusal: Refusal, place: str, budget: int, most: int | None, partial: bool
) -> OutOfMemoryError:
    """The error for a lease that the planner refused, with the least memory that would do and the setting to change.

    ``place`` is the ledger's name of the memory, ``budget`` its bytes. ``most`` is the bytes that the settings allow,
    None for all. ``partial`` says whether a component may be resident in part.
    """
    setting = "max_cache_ram_gb" if place == HOST else "max_cache_vram_gb"
    working, lacking = lease.use.working, refusal.least - refusal.available
    if most is not None and most < budget - working:
        hint = f"{setting} is {_gb(most)}; the least with which this works is {_gb(most + lacking)}"
    else:
        hint = (
            f"This process can have {_gb(budget)} GB, {_gb(working)} GB of it for computing; "
            f"the least with which this works is {_gb(budget + lacking)} GB"
        )
    hint += f", as {refusal.reason}."
    if not partial:
        hint += " enable_partial_loading: true needs less."
    role = lease.component.role.replace("_", " ")
    return OutOfMemoryError(f"The {role}", refusal.least, max(0, refusal.available), hint, final=True)


def _gb(nbytes: int) -> str:
    """Gigabytes (2^30 bytes) for people, rounded up."""
    return f"{math.ceil(nbytes / 2**30 * 10000) / 10000:.4f}"
