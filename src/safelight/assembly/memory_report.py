"""Describes the state of memory as plain values: for users, progress events and APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safelight.devices.transfer import Transfers
from safelight.devices.verification import Verification
from safelight.memory.budget import Ledger
from safelight.memory.limits import Limits
from safelight.memory.residency import Residency


def memory(
    ledger: Ledger,
    limits: Sequence[Limits],
    residencies: Sequence[Residency],
    transfers: Transfers,
    verification: Verification,
) -> dict[str, Any]:
    """Describe the state of memory; sizes in bytes.

    ``places``: for each place its budget, the origin of the budget, and what is resident.
    ``entries``: the ledger's entries.
    """
    tiers = {tier.place: tier for tier in residencies}
    return {
        "places": {
            limit.place: {
                "budget": ledger.budget(limit.place),
                "set_by": limit.source,
                "for_models": tiers[limit.place].planner.max_bytes,
                "stored": ledger.stored(limit.place),
                "promised": ledger.reserved(limit.place),
                "peak": ledger.peak(limit.place),
                "resident": [asdict(holding) for holding in tiers[limit.place].holdings()],
                "last_plan": tiers[limit.place].last_plan(),
            }
            for limit in limits
        },
        "entries": [asdict(entry) for entry in ledger.entries()],
        "transfers": asdict(transfers.counts),
        "verification": verification.describe(),
    }
