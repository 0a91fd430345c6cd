"""Describes the state of memory as plain values: for users, progress events and APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safelight.devices.transfer import Transfers
from safelight.devices.verification import Verification
from safelight.memory.budget import Ledger
from safelight.memory.limits import BudgetUpdater
from safelight.memory.residency import Residency


def memory(
    ledger: Ledger,
    updaters: Sequence[BudgetUpdater],
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
            updater.place: {
                "budget": ledger.budget(updater.place),
                "set_by": updater.source,
                "for_models": tiers[updater.place].planner.max_bytes,
                "stored": ledger.stored(updater.place),
                "promised": ledger.reserved(updater.place),
                "peak": ledger.peak(updater.place),
                "resident": [asdict(usage) for usage in tiers[updater.place].usage_by_component()],
                "last_plan": tiers[updater.place].last_plan(),
            }
            for updater in updaters
        },
        "entries": [
            {
                "place": entry.place,
                "nbytes": entry.nbytes,
                "owner": entry.owner,
                "reason": entry.reason,
                "stored": entry.stored,
            }
            for entry in ledger.entries()  # There is one for each slab; asdict is slow.
        ],
        "transfers": asdict(transfers.counts),
        "verification": verification.describe(),
    }
